"""One source file: its headers first, without reading a voxel, then the volume as conversion would read it."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from gpuparse import places
from gpuparse.check.findings import Finding, Place
from gpuparse.errors import VolumeFormatError
from gpuparse.npz import Member, NpzFile
from gpuparse.remote import RemotePath
from gpuparse.volume import Volume, check_name, check_regular, read_volume

__all__ = ["check_source"]

_MEMBERS = ("imgs", "gts", "spacing")
_FREE_BYTES = 1 << 20  # of a file, beside its arrays
_PIECE_BYTES = 32 << 20
_REFUSED = {"imgs": "GP107", "gts": "GP108", "spacing": "GP109"}


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
        with path.open("rb") as file:
            headers = _read_headers(NpzFile(file))
    except VolumeFormatError as error:
        return None, [place.failure("GP101", str(error).removeprefix(f"{path}: "), error)]
    except Exception as error:  # damaged archives make zipfile and numpy raise nearly anything
        return None, [place.failure("GP101", f"{type(error).__name__}: {error}.", error)]
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


def _read_headers(archive: NpzFile) -> dict[str, Member]:
    """The header of each array, but of those that cannot be read and that conversion does not read."""
    headers = {}
    for name in archive.keys:
        try:
            headers[name] = archive.header(name)
        except Exception:
            if name in _MEMBERS:
                raise
    for name, header in headers.items():
        if name in _MEMBERS and not header.dtype.hasobject:  # of objects the header knows the number, not the bytes
            archive.check_size(name, header)
    return headers


def _check_headers(place: Place, headers: Mapping[str, Member], max_volume_bytes: int) -> list[Finding]:
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
    declared = sum(header.nbytes for name, header in headers.items() if name in _MEMBERS)
    if declared > max_volume_bytes:
        gib = f"{declared / 2**30:.1f} GiB, more than {max_volume_bytes / 2**30:g} GiB"
        findings.append(place.finding("GP106", f"its arrays declare {gib}."))
    if image and image.dtype.kind == "f":
        findings.append(place.finding("GP111", f"imgs has dtype {image.dtype}; conversion cuts fractions off."))
    extras = [name for name, header in headers.items() if name not in _MEMBERS and header.dtype.hasobject]
    if extras:
        findings.append(place.finding("GP112", f"{', '.join(extras)}."))
    return findings
