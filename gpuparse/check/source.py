"""One source file: its headers first, without reading a voxel, then the volume as conversion would read it."""

from __future__ import annotations

import math
import re
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from gpuparse import places
from gpuparse.check.findings import Finding, Place
from gpuparse.errors import VolumeFormatError
from gpuparse.remote import RemotePath
from gpuparse.volume import Volume, check_name, check_regular, read_volume

__all__ = ["check_source"]

_MEMBERS = ("imgs", "gts", "spacing")
_FREE_BYTES = 1 << 20  # of a file, beside its arrays
_PIECE_BYTES = 32 << 20
_REFUSED = {"imgs": "GP107", "gts": "GP108", "spacing": "GP109"}


@dataclass(frozen=True)
class _Header:
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def check_source(place: Place, path: places.Place, max_volume_bytes: int) -> tuple[Volume | None, list[Finding]]:
    """Checks one npz file.

    Args:
        place: The case.
        path: The file. A remote one is fetched to a temporary file first, unless it is larger than a volume may be.
        max_volume_bytes: Largest size, as declared by the headers, that is read.

    Returns:
        The volume, None where conversion would refuse the file, and the findings.

    Raises:
        StorageError: Remote storage fails.
    """
    try:
        check_name(path.stem, "case name")
    except VolumeFormatError as error:
        return None, [place.finding("GP110", str(error))]
    if not isinstance(path, RemotePath):
        return _check_file(place, places.local_path(path), max_volume_bytes)
    try:
        end = path.read_end(1)
    except FileNotFoundError as error:
        return None, [place.finding("GP101", f"{error}.")]
    if end.object_bytes > max_volume_bytes + _FREE_BYTES:
        return None, [place.finding("GP106", f"the file has {end.object_bytes / 2**30:.1f} GiB.")]
    with tempfile.TemporaryDirectory(prefix="gpuparse-check-") as folder:
        copy = Path(folder, path.name)
        with copy.open("wb") as file:
            for offset in range(0, end.object_bytes, _PIECE_BYTES):
                file.write(path.read_range(offset, min(_PIECE_BYTES, end.object_bytes - offset), end.etag).data)
        volume, findings = _check_file(place, copy, max_volume_bytes)
    return volume, [replace(finding, found=finding.found.replace(str(copy), str(path))) for finding in findings]


def _check_file(place: Place, path: Path, max_volume_bytes: int) -> tuple[Volume | None, list[Finding]]:
    try:
        check_regular(path)
        with zipfile.ZipFile(path) as archive:
            headers = {name.removesuffix(".npy"): _read_header(archive, name) for name in _members(archive)}
    except VolumeFormatError as error:
        return None, [place.finding("GP101", str(error).removeprefix(f"{path}: "))]
    except Exception as error:  # damaged archives make zipfile and numpy raise nearly anything
        return None, [place.finding("GP101", f"{type(error).__name__}: {error}.")]
    findings = _check_headers(place, headers, max_volume_bytes)
    if any(finding.severity == "error" for finding in findings):
        return None, findings
    try:
        return read_volume(path, max_volume_bytes), findings
    except VolumeFormatError as error:
        found = str(error).removeprefix(f"{path}: ")
        # Messages begin with what they are about; a file that is damaged behind its headers names no member first.
        about = re.match("(imgs|gts|spacing) ", found)
        return None, [*findings, place.finding(_REFUSED[about[1]] if about else "GP101", found)]


def _members(archive: zipfile.ZipFile) -> list[str]:
    return [name for name in archive.namelist() if name.endswith(".npy")]


def _read_header(archive: zipfile.ZipFile, name: str) -> _Header:
    with archive.open(name) as member:
        version = np.lib.format.read_magic(member)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(member)
    header = _Header(shape, dtype)
    stored_bytes = archive.getinfo(name).file_size
    if name.removesuffix(".npy") in _MEMBERS and not dtype.hasobject and header.num_bytes > stored_bytes:
        raise ValueError(f"{name} declares {header.num_bytes} bytes of values and holds {stored_bytes}")
    return header


def _check_headers(place: Place, headers: Mapping[str, _Header], max_volume_bytes: int) -> list[Finding]:
    missing = [name for name in _MEMBERS if name not in headers]
    findings = []
    if missing:
        findings.append(place.finding("GP102", f"no {', '.join(missing)}, only {', '.join(headers) or 'nothing'}."))
    for name, header in headers.items():
        if name not in _MEMBERS:
            continue
        if header.dtype.hasobject:
            findings.append(place.finding("GP103", f"{name} holds Python objects."))
        elif header.dtype.kind not in "buif":
            findings.append(place.finding("GP105", f"{name} has dtype {header.dtype}."))
        if name != "spacing" and (len(header.shape) != 3 or 0 in header.shape):
            findings.append(place.finding("GP104", f"{name} has shape {header.shape}."))
    image, labels = headers.get("imgs"), headers.get("gts")
    if image and labels and image.shape != labels.shape:
        findings.append(place.finding("GP104", f"imgs has shape {image.shape} and gts {labels.shape}."))
    declared = sum(headers[name].num_bytes for name in _MEMBERS if name in headers)
    if declared > max_volume_bytes:
        gib = f"{declared / 2**30:.1f} GiB, more than {max_volume_bytes / 2**30:g} GiB"
        findings.append(place.finding("GP106", f"its arrays declare {gib}."))
    if image and image.dtype.kind == "f":
        findings.append(place.finding("GP111", f"imgs has dtype {image.dtype}; conversion cuts fractions off."))
    extras = [name for name, header in headers.items() if name not in _MEMBERS and header.dtype.hasobject]
    if extras:
        findings.append(place.finding("GP112", f"{', '.join(extras)}."))
    return findings
