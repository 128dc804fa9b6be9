"""npz files that contradict themselves: what reading an array says of them, besides what conversion tests at large."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib

import numpy as np
import pytest

from gpuparse.npz import DamagedError, NpzFile, TooLargeError

IMAGE = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)


def npz(**arrays):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def with_entry(raw, **changes):
    """`raw` with other numbers in its (only) entry of the central directory."""
    layout, names = "<3I", ("crc", "compressed_bytes", "num_bytes")
    start = raw.index(b"PK\x01\x02") + 16
    entry = dict(zip(names, struct.unpack_from(layout, raw, start), strict=True)) | changes
    return raw[:start] + struct.pack(layout, *entry.values()) + raw[start + 12 :]


def test_an_array_larger_than_wanted_is_not_inflated():
    archive = NpzFile(npz(imgs=IMAGE))
    with pytest.raises(TooLargeError, match="imgs declares 24 bytes; at most 23 are allowed"):
        archive.read("imgs", 23)
    np.testing.assert_array_equal(archive.read("imgs", 24), IMAGE)


def test_a_member_that_is_shorter_than_it_declares_is_damaged():
    raw = npz(imgs=IMAGE)
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        member = archive.read("imgs.npy")
    short = with_entry(raw, compressed_bytes=len(member) - 2, crc=zlib.crc32(member[:-2]))
    with pytest.raises(DamagedError, match=f"imgs has {len(member) - 2} bytes; its member declares {len(member)}"):
        NpzFile(short).read("imgs", 100)


def test_a_member_before_which_another_name_stands_is_refused():
    raw = npz(imgs=IMAGE).replace(b"imgs.npy", b"sgmi.npy", 1)  # the header in front; its entry is at the end
    with pytest.raises(zipfile.BadZipFile, match=r"File name in directory 'imgs\.npy' and header b'sgmi\.npy' differ"):
        NpzFile(raw).read("imgs", 100)


def with_member(content):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("imgs.npy", content)
    return buffer.getvalue()


def npy_header(text, version=1):
    length = struct.pack("<H" if version == 1 else "<I", len(text))
    return b"\x93NUMPY" + bytes([version, 0]) + length + text.encode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"words, words, words", "an array does not begin like one"),
        (b"\x93NUMPY\x01", "an array does not begin like one"),
        (b"\x93NUMPY\x09\x00" + bytes(20), "an array does not begin like one"),
        (b"\x93NUMPY\x02\x00" + b"\xff\xff\xff\x3f" + b" " * 20_000, "an array's header is longer than can be"),
        (npy_header("{'descr': '|u1', 'fortran_order': False, 'shape': (-2, 3), }\n"),
         r"an array has the shape \(-2, 3\)"),
        (npy_header("{'descr': '|u1', 'fortran_order': False, 'shape': (2, 3), }\n", 2) + b"abc",
         r"imgs declares \(2, 3\) elements of uint8, 6 bytes, and its member has 3"),
    ],
)  # fmt: skip
def test_a_header_that_cannot_be_is_refused(content, message):
    with pytest.raises(DamagedError, match=message):
        NpzFile(with_member(content)).read("imgs", 100)


def test_values_that_differ_from_their_checksum_are_damaged():
    image = np.arange(40_000, dtype=np.uint8).reshape(200, 10, 20)  # beyond what is read for the header
    raw = bytearray(npz(imgs=image))
    raw[raw.index(image.tobytes()) + 39_000] ^= 1
    with pytest.raises(DamagedError, match=r"imgs\.npy does not match its CRC-32"):
        NpzFile(bytes(raw)).read("imgs", 40_000)
