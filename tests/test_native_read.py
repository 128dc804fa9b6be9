"""The host library's reading half: crc32c, the LZ4 decoder and frames into raw blocks, each against another library."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import random
import struct

import google_crc32c
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numcodecs import lz4

from gpuparse import kernels
from gpuparse.locate import CHUNK_DTYPE
from gpuparse.read import COMPRESSED_BLOCK_DTYPE, RESULT_DTYPE

VARIANTS = ["baseline", "avx2"] if kernels.host_library("baseline").gpuparse_supports_avx2() else ["baseline"]
GUARD = 0xA5
LITERAL_LENGTHS = [1, 14, 15, 16, 269, 270, 271, 525, 16384]


# The checksum.


def crc32c(data: bytes, by_table: bool) -> int:
    function = kernels.host_library("baseline").gpuparse_crc32c
    function.restype = ctypes.c_uint32
    return function(data, ctypes.c_int64(len(data)), ctypes.c_int32(by_table))


@pytest.mark.parametrize("by_table", [False, True])
def test_crc32c_of_all_small_lengths_and_offsets(by_table):
    assert crc32c(b"123456789", by_table) == 0xE3069283  # the check value of RFC 3720's polynomial
    data = random.Random(1).randbytes(200)
    for length in range(100):
        for start in (0, 1, 3, 7):
            part = data[start : start + length]
            assert crc32c(part, by_table) == google_crc32c.value(part)


@given(data=st.binary(max_size=5000), by_table=st.booleans())
def test_crc32c_of_anything(data, by_table):
    assert crc32c(data, by_table) == google_crc32c.value(data)


@pytest.mark.parametrize("piece", [256, 2048])
def test_crc32c_around_three_pieces_and_more(piece):
    """The instruction goes over three pieces at once, of the longer kind while there are, then of the shorter."""
    data = random.Random(2).randbytes(9 * 2048 + 800)
    for length in (*range(3 * piece - 9, 3 * piece + 10), 6 * piece, 9 * piece, 3 * 2048 + 3 * 256 + 11):
        for start in (0, 5):
            part = data[start : start + length]
            assert crc32c(part, False) == crc32c(part, True) == google_crc32c.value(part)


@given(seed=st.integers(0, 2**32 - 1), length=st.integers(0, 1 << 17))
def test_crc32c_of_long_data(seed, length):
    data = random.Random(seed).randbytes(length)
    assert crc32c(data, False) == google_crc32c.value(data)


# The decoder.


class Fence:
    """Memory whose last byte is followed by a page that nobody may read: one byte too far ends the process."""

    def __init__(self, num_bytes: int) -> None:
        page = mmap.PAGESIZE
        self._usable = -(-num_bytes // page) * page
        self._map = mmap.mmap(-1, self._usable + page)
        self._bytes = np.frombuffer(self._map, np.uint8)
        protect = ctypes.CDLL(None, use_errno=True).mprotect
        status = protect(ctypes.c_void_p(self._bytes.ctypes.data + self._usable), ctypes.c_size_t(page), 0)
        assert status == 0

    def put(self, data: bytes) -> np.ndarray:
        """A copy of `data` that ends where the fence stands."""
        place = self._bytes[self._usable - len(data) : self._usable]
        place[:] = np.frombuffer(data, np.uint8)
        return place


FENCE = Fence(1 << 20)


def inflate(blocks, variant="baseline", num_threads=1, gap=3):
    """Decodes (block, length) pairs to places `gap` bytes apart; returns the first bad one and what was decoded."""
    table = np.zeros(len(blocks), COMPRESSED_BLOCK_DTYPE)
    table["num_bytes"] = [len(block) for block, _ in blocks]
    table["data_offset"] = np.cumsum(table["num_bytes"]) - table["num_bytes"]
    table["decoded_bytes"] = [length for _, length in blocks]
    table["target"] = gap + np.cumsum(table["decoded_bytes"] + gap) - (table["decoded_bytes"] + gap)
    arena = np.full(int((table["decoded_bytes"] + gap).sum()) + gap, GUARD, np.uint8)
    data = FENCE.put(b"".join(block for block, _ in blocks))
    function = kernels.host_library(variant).gpuparse_inflate
    function.restype = ctypes.c_int64
    pointers = map(kernels.pointer, (data, table, arena))
    bad = function(ctypes.c_int64(len(blocks)), ctypes.c_int32(num_threads), *pointers)
    out, between = [], np.ones(len(arena), bool)
    for target, length in zip(table["target"].tolist(), table["decoded_bytes"].tolist(), strict=True):
        between[target : target + length] = False
        out.append(arena[target : target + length].tobytes())
    assert (arena[between] == GUARD).all()
    return bad, out


def decode_by_the_format(block: bytes, num_out: int) -> bytes | None:
    """A raw LZ4 block byte by byte; None where it is no block of that length."""
    out, place = bytearray(), 0
    try:
        while place < len(block):
            token = block[place]
            place += 1
            lengths = [token >> 4, token & 15]
            for k in (0, 1):
                if lengths[k] == 15:
                    while True:
                        lengths[k] += block[place]
                        place += 1
                        if block[place - 1] != 255:
                            break
                if k == 0:
                    if place + lengths[0] > len(block) or len(out) + lengths[0] > num_out:
                        return None
                    out += block[place : place + lengths[0]]
                    place += lengths[0]
                    if place == len(block):
                        return bytes(out) if len(out) == num_out else None
                    offset = block[place] + 256 * block[place + 1]
                    place += 2
            count = lengths[1] + 4
            if not 1 <= offset <= len(out) or len(out) + count > num_out:
                return None
            for _ in range(count):
                out.append(out[-offset])
    except IndexError:
        return None
    return bytes(out) if len(out) == num_out else None


def write_length(length: int) -> tuple[int, bytes]:
    """A token's four bits and the bytes that continue them."""
    if length < 15:
        return length, b""
    return 15, b"\xff" * ((length - 15) // 255) + bytes([(length - 15) % 255])


def write_block(sequences, last: bytes) -> bytes:
    """An LZ4 block of (literals, offset, match length) sequences and its last literals."""
    out = b""
    for literals, offset, count in sequences:
        (high, more), (low, rest) = write_length(len(literals)), write_length(count - 4)
        out += bytes([high << 4 | low]) + more + literals + struct.pack("<H", offset) + rest
    high, more = write_length(len(last))
    return out + bytes([high << 4]) + more + last


def compress(data: bytes) -> bytes:
    return lz4.compress(data)[4:]  # numcodecs puts the length in front


MIXTURES = st.lists(
    st.one_of(
        st.binary(max_size=300),
        st.tuples(st.binary(min_size=1, max_size=20), st.integers(1, 3000)).map(
            lambda run: (run[0] * (run[1] // len(run[0]) + 1))[: run[1]]
        ),
    ),
    min_size=1,
    max_size=8,
).map(b"".join)


@pytest.mark.parametrize("variant", VARIANTS)
@given(parts=st.lists(MIXTURES.filter(len), min_size=1, max_size=5), num_threads=st.integers(1, 3))
def test_what_lz4_compressed_comes_back(variant, parts, num_threads):
    bad, out = inflate([(compress(part), len(part)) for part in parts], variant, num_threads)
    assert bad == -1
    assert out == parts


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_offset_and_the_edges_of_lengths(variant):
    rng = random.Random(2)
    blocks, expected = [], []
    counts = [4, 5, 15, 16, 17, 18, 19, 20, 31, 32, 33, 34, 47, 48, 64, 273, 274, 275, 529, 65535 - 300]
    for offset in [*range(1, 21), 31, 32, 33, 250]:
        for count in counts:
            literals = rng.randbytes(max(offset, rng.choice([15, 269, 270, 271])))
            last = rng.randbytes(rng.choice([0, 1, 14, 15, 16, 31]))  # so near the end that wide copies do not fit
            match = (literals[-offset:] * (count // offset + 1))[:count]
            blocks.append((write_block([(literals, offset, count)], last), len(literals) + count + len(last)))
            expected.append(literals + match + last)
    for start in range(0, len(blocks), 40):
        bad, out = inflate(blocks[start : start + 40], variant)
        assert bad == -1
        assert out == expected[start : start + 40]


@pytest.mark.parametrize("length", [*LITERAL_LENGTHS, 2, 13, 17, 254, 255, 256, 65535])
def test_blocks_of_any_length(length):
    rng = random.Random(length)
    for data in (bytes(length), rng.randbytes(length), (rng.randbytes(7) * length)[:length]):
        assert inflate([(compress(data), length)]) == (-1, [data])


@given(
    parts=st.lists(
        st.tuples(st.binary(max_size=20), st.integers(1, 70), st.integers(4, 90)), max_size=6
    ),
    last=st.binary(max_size=20),
)  # fmt: skip
@example(parts=[(b"a", 1, 4)], last=b"")
def test_any_sequences_as_the_format_says(parts, last):
    block = write_block(parts, last)
    length = sum(len(literals) + count for literals, _, count in parts) + len(last)
    expected = decode_by_the_format(block, length)  # None where a match reaches before the block
    bad, out = inflate([(block, length)])
    assert bad == (0 if expected is None else -1)
    assert expected is None or out == [expected]


def test_the_first_bad_block_is_named_whatever_the_threads():
    good = (compress(b"abcd" * 300), 1200)
    for bad in (
        (good[0], 1199),
        (good[0], 1201),
        (good[0][:-1], 1200),
        (b"", 5),
        (write_block([(b"abc", 0, 8)], b""), 11),  # offset 0
        (write_block([(b"abc", 4, 8)], b""), 11),  # before the block
        (b"\xf0" + b"\xff" * 40, 9000),  # a length that does not end
        (b"\x1fx\x01", 30),  # half an offset
    ):
        for num_threads in (1, 3):
            found, out = inflate([good] * 3 + [bad] + [good] * 3 + [bad], num_threads=num_threads)
            assert found == 3
            assert out[:3] == [b"abcd" * 300] * 3


@pytest.mark.parametrize("variant", VARIANTS)
def test_2000_mutations_are_decoded_or_refused_as_the_format_says(variant):
    rng = random.Random(3)
    num_refused = 0
    for _ in range(2000):
        parts = [rng.randbytes(rng.randrange(30)), bytes([rng.randrange(256)]) * rng.randrange(200)]
        data = b"".join(parts * 3) + rng.randbytes(5)
        block = bytearray(compress(data))
        for _ in range(rng.randint(1, 3)):
            block[rng.randrange(len(block))] = rng.choice([0, 1, 15, 240, 255, rng.randrange(256)])
        cut = rng.choice([len(block), len(block), rng.randrange(len(block))])
        expected = decode_by_the_format(bytes(block[:cut]), len(data))
        bad, out = inflate([(bytes(block[:cut]), len(data))], variant)
        assert bad == (0 if expected is None else -1)
        assert expected is None or out == [expected]
        num_refused += expected is None
    assert 500 < num_refused < 1990


# Frames into blocks.


def frame_of(blocks: list[bytes], lengths: list[int]) -> bytes:
    """A blosc frame by hand, its blocks as they are; a block as long as what it decodes to is a stored one."""
    starts, body = [], b""
    for block in blocks:
        starts.append(16 + 4 * len(blocks) + len(body))
        body += struct.pack("<i", len(block)) + block
    total = sum(lengths)
    head = struct.pack("<BBBBIII", 2, 1, 0x20, 1, total, min(total, 16384), 16 + 4 * len(blocks) + len(body))
    return head + struct.pack(f"<{len(starts)}i", *starts) + body


def stored_frame(data: bytes) -> bytes:
    return struct.pack("<BBBBIII", 2, 1, 0x22, 1, len(data), min(len(data), 16384), 16 + len(data)) + data


def sealed(frame: bytes) -> bytes:
    return frame + struct.pack("<I", google_crc32c.value(frame))


def read_chunk(path, raw: bytes, decoded_bytes: int, *, num_bytes=None, file=None, room=None):
    """One chunk of a file through the library: its result, its blocks, the buffer."""
    path.write_bytes(b"before" + raw)
    num_bytes = len(raw) if num_bytes is None else num_bytes
    num_blocks = -(-decoded_bytes // 16384)
    capacity = -(-(num_bytes + num_bytes // 255 + 18 * num_blocks) // 16) * 16 if room is None else room
    request, result = np.zeros(1, CHUNK_DTYPE), np.zeros(1, RESULT_DTYPE)
    blocks = np.zeros(num_blocks + 2, COMPRESSED_BLOCK_DTYPE)
    data = np.full(capacity + 64, GUARD, np.uint8)
    opened = os.open(path, os.O_RDONLY)
    request[0] = (6, num_bytes, decoded_bytes, 4096, 32, capacity, 1, opened if file is None else file, 0)
    try:
        kernels.host_library().gpuparse_read_chunks(
            ctypes.c_int64(1), ctypes.c_int32(1), *map(kernels.pointer, (request, data, blocks, result))
        )
    finally:
        os.close(opened)
    assert (data[:32] == GUARD).all()
    assert (data[32 + capacity :] == GUARD).all()
    assert not blocks[0]["decoded_bytes"]
    assert not blocks[-1]["decoded_bytes"]
    return result[0], blocks[1:-1], data


@pytest.mark.parametrize("length", [*LITERAL_LENGTHS, 16385, 16384 + 270, 3 * 16384 - 1])
def test_stored_blocks_become_lz4_blocks_of_literals(tmp_path, length):
    data = random.Random(length).randbytes(length)
    parts = [data[i : i + 16384] for i in range(0, length, 16384)]
    for frame in (stored_frame(data), frame_of(parts, [len(part) for part in parts])):
        result, blocks, buffer = read_chunk(tmp_path / "shard", sealed(frame), length)
        assert result["status"] == 0
        for i, (part, block) in enumerate(zip(parts, blocks, strict=True)):
            start, size, target = (int(block[name]) for name in ("data_offset", "num_bytes", "target"))
            assert (start % 16, target, block["decoded_bytes"]) == (0, 4096 + 16384 * i, len(part))
            raw = buffer[start : start + size].tobytes()
            assert raw == write_block([], part)
            assert lz4.decompress(struct.pack("<I", len(part)) + raw) == part


def test_compressed_and_stored_blocks_of_one_frame(tmp_path):
    rng = random.Random(5)
    parts = [bytes(16384), rng.randbytes(16384), b"\7" * 300 + rng.randbytes(100)]
    packed = [compress(parts[0]), parts[1], compress(parts[2])]
    frame = frame_of(packed, [len(part) for part in parts])
    result, blocks, buffer = read_chunk(tmp_path / "shard", sealed(frame), 2 * 16384 + 400)
    assert result["status"] == 0
    sources = [packed[0], write_block([], parts[1]), packed[2]]
    for block, raw in zip(blocks, sources, strict=True):
        start = int(block["data_offset"])
        assert buffer[start : start + int(block["num_bytes"])].tobytes() == raw


@pytest.mark.skipif("libasan" in os.environ.get("LD_PRELOAD", ""), reason="g++'s sanitizer keeps freed memory")
def test_a_thread_keeps_no_room_for_large_chunks(tmp_path):
    """A slice of microscopy takes a hundred megabytes, and threads live as long as the process."""
    data = np.random.default_rng(3).bytes(40 << 20)
    small = sealed(stored_frame(data[:100]))
    assert read_chunk(tmp_path / "shard", small, 100)[0]["status"] == 0
    before = resident_bytes()
    result, blocks, buffer = read_chunk(tmp_path / "shard", sealed(stored_frame(data)), len(data))
    assert result["status"] == 0
    last = blocks[-1]
    start, size = int(last["data_offset"]), int(last["num_bytes"])
    assert buffer[start : start + size].tobytes() == write_block([], data[-16384:])
    del result, blocks, buffer, last
    assert read_chunk(tmp_path / "shard", small, 100)[0]["status"] == 0
    assert resident_bytes() < before + (20 << 20)


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * mmap.PAGESIZE


def test_what_a_file_lacks_is_reported(tmp_path):
    frame = sealed(stored_frame(b"x" * 100))
    result, _, _ = read_chunk(tmp_path / "shard", frame, 100, num_bytes=len(frame) + 7)
    assert (result["status"], result["detail"], result["from_storage"]) == (2, len(frame), 1)
    result, _, _ = read_chunk(tmp_path / "shard", frame, 100, file=-1)
    assert (result["status"], result["detail"]) == (1, errno.EBADF)


def test_a_frame_that_needs_more_room_than_its_bytes_allow_is_refused(tmp_path):
    # Two block starts at one place: read twice, the blocks would not fit the buffer.
    one = bytes(range(256)) * 63
    frame = bytearray(frame_of([one, b""], [16384, 16384]))
    struct.pack_into("<ii", frame, 16, 24, 24)
    result, _, _ = read_chunk(tmp_path / "shard", sealed(bytes(frame)), 2 * 16384)
    assert (result["status"], result["detail"]) == (6, 1)


@given(seed=st.integers(0, 10**6), num_changes=st.integers(1, 4))
def test_any_frame_with_a_true_checksum_stays_inside_its_room(tmp_path_factory, seed, num_changes):
    rng = random.Random(seed)
    parts = [bytes([rng.randrange(256)]) * 16384, rng.randbytes(700)]
    frame = bytearray(frame_of([compress(parts[0]), parts[1]], [16384, 700]))
    for _ in range(num_changes):
        frame[rng.randrange(40)] = rng.choice([0, 1, 2, 255, rng.randrange(256)])
    path = tmp_path_factory.getbasetemp() / "mutated"
    result, blocks, buffer = read_chunk(path, sealed(bytes(frame)), 16384 + 700)
    assert result["status"] in (0, 4, 5, 6)
    if result["status"] == 0:
        ends = blocks["data_offset"] + blocks["num_bytes"]
        assert (ends <= len(buffer) - 64).all()
