"""Arrays of an npz file, read without trusting it: headers first, sizes before memory, nothing unpickled.

Members are inflated by libdeflate in one call each, into exactly the bytes that their header declares; that is 2 to 3
times as fast as zlib on images and more than 10 times on masks.
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
from dataclasses import dataclass
from typing import Any

import deflate
import numpy as np
import numpy.typing as npt

__all__ = ["DamagedError", "Member", "NpzFile", "TooLargeError"]

_MAX_HEADER_BYTES = 1 << 14  # numpy itself refuses headers above 10,000
_MAX_DEFLATE_RATIO = 1032  # deflated bytes cannot grow by more than that
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")


class DamagedError(ValueError):
    """The file contradicts itself."""


class TooLargeError(ValueError):
    """An array is larger than allowed; nothing of it has been inflated."""


@dataclass(frozen=True)
class Member:
    """What the header of one array declares.

    Attributes:
        shape: Its shape, in the order of the axes.
        dtype: Its element type.
        fortran_order: Whether the first axis changes fastest in the file.
        header_bytes: Where the elements begin.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran_order: bool
    header_bytes: int

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.shape) * self.dtype.itemsize


class NpzFile:
    """An npz file in memory or on disk.

    Args:
        raw: The file's bytes, or an open file of them where only headers are wanted.

    Raises:
        zipfile.BadZipFile: It is no complete zip file.
    """

    def __init__(self, raw: bytes | io.BufferedReader) -> None:
        self._raw = raw
        self._archive = zipfile.ZipFile(io.BytesIO(raw) if isinstance(raw, bytes) else raw)
        self._headers: dict[str, Member] = {}
        self._infos = {info.filename: info for info in self._archive.infolist()}

    @property
    def keys(self) -> list[str]:
        """Names of the arrays, sorted."""
        return sorted(name.removesuffix(".npy") for name in self._infos if name.endswith(".npy"))

    def header(self, key: str) -> Member:
        """Reads the header of one array and no element of it.

        Raises:
            DamagedError: The header is none, or declares other sizes than the archive does.
        """
        if key not in self._headers:
            with self._archive.open(self._infos[f"{key}.npy"]) as file:
                self._headers[key] = _parse_header(file.read(_MAX_HEADER_BYTES))
        return self._headers[key]

    def check_size(self, key: str, member: Member) -> None:
        """Compares the size that an array's header declares with that of its place in the archive.

        Raises:
            DamagedError: They differ, or the compressed bytes are too few to hold that much.
        """
        info = self._infos[f"{key}.npy"]
        if member.header_bytes + member.nbytes != info.file_size:
            raise DamagedError(
                f"{key} declares {member.shape} elements of {member.dtype}, {member.nbytes} bytes, "
                f"and its member has {info.file_size - member.header_bytes}"
            )
        if info.compress_type == zipfile.ZIP_DEFLATED and info.file_size // _MAX_DEFLATE_RATIO > info.compress_size:
            raise DamagedError(f"{key} declares {info.file_size} bytes in {info.compress_size}: deflate cannot do that")

    def read(self, key: str, max_bytes: int) -> npt.NDArray[Any]:
        """Reads one array.

        Args:
            key: Its name.
            max_bytes: The most that it may take.

        Returns:
            The array as the file has it, perhaps read-only.

        Raises:
            TooLargeError: It declares more than `max_bytes`.
            DamagedError: Its bytes do not fit its header or its checksum.
        """
        member = self.header(key)
        self.check_size(key, member)
        if member.nbytes > max_bytes:
            raise TooLargeError(f"{key} declares {member.nbytes} bytes; at most {max_bytes} are allowed")
        info = self._infos[f"{key}.npy"]
        data = self._inflate(info)
        if len(data) != info.file_size:
            raise DamagedError(f"{key} has {len(data)} bytes; its member declares {info.file_size}")
        values = np.frombuffer(data, member.dtype, math.prod(member.shape), member.header_bytes)
        return values.reshape(member.shape, order="F" if member.fortran_order else "C")

    def _inflate(self, info: zipfile.ZipInfo) -> bytes | bytearray | memoryview:
        """All bytes of a member that `header` was read of."""
        plain = info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) and not info.flag_bits & 1
        if not plain or not isinstance(self._raw, bytes):
            return self._archive.read(info)
        start = info.header_offset
        # zipfile has compared this header with its entry: `header` has opened the member.
        *_, name_bytes, extra_bytes = _LOCAL_HEADER.unpack_from(self._raw, start)
        start += _LOCAL_HEADER.size + name_bytes + extra_bytes
        packed = memoryview(self._raw)[start : start + info.compress_size]
        if info.compress_type == zipfile.ZIP_STORED:
            data: bytes | bytearray | memoryview = packed
        else:
            data = deflate.deflate_decompress(packed, info.file_size)
        if deflate.crc32(data) != info.CRC:
            raise DamagedError(f"{info.filename} does not match its CRC-32")
        return data


def _parse_header(head: bytes) -> Member:
    """The header of an npy file, format versions 1 to 3: magic, version, length, and a Python dictionary as text."""
    if head[:6] != b"\x93NUMPY" or len(head) < 12 or head[6] not in (1, 2, 3):
        raise DamagedError("an array does not begin like one")
    start, length_bytes = (10, 2) if head[6] == 1 else (12, 4)
    end = start + int.from_bytes(head[start - length_bytes : start], "little")
    if end > len(head):
        raise DamagedError("an array's header is longer than can be")
    file = io.BytesIO(head)
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran_order, dtype = read_header(file)
    if any(not isinstance(n, int) or n < 0 for n in shape):
        raise DamagedError(f"an array has the shape {shape}")
    return Member(tuple(shape), dtype, fortran_order, file.tell())
