"""Damage to a file's bytes, drawn from a random number generator."""

from __future__ import annotations

import random
import struct

__all__ = ["cut", "enlarge", "flip", "splice"]


def flip(raw: bytearray, rng: random.Random) -> bytes:
    for _ in range(rng.choice([1, 1, 2, 8, 40])):
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    return bytes(raw)


def cut(raw: bytearray, rng: random.Random) -> bytes:
    start, stop = sorted(rng.randrange(len(raw) + 1) for _ in range(2))
    return bytes(rng.choice([raw[:start], raw[:start] + raw[stop:], raw[start:]]))


def splice(raw: bytearray, rng: random.Random) -> bytes:
    """Something of the file again at another place in it: sizes, headers and entries that belong elsewhere."""
    length = rng.choice([2, 4, 8, 30, 128])
    source, target = rng.randrange(len(raw)), rng.randrange(len(raw))
    raw[target : target + length] = raw[source : source + length]
    return bytes(raw)


def enlarge(raw: bytearray, rng: random.Random) -> bytes:
    """Numbers in place of others: lengths near the limits of their fields."""
    value = rng.choice([0, 1, 2**15, 2**16 - 1, 2**31, 2**32 - 2, 2**32 - 1])
    place = rng.randrange(len(raw) - 4)
    raw[place : place + 4] = struct.pack("<I", value)
    return bytes(raw)
