"""NIfTI files as they should not be: each is refused by name, none is half read."""

from __future__ import annotations

import contextlib
import gzip
import struct

import nibabel
import numpy as np
import pytest
from permissions import forbidden
from scans import phantom, write_nifti

from gpuparse.errors import GpuparseError, MissingDependencyError, VolumeFormatError
from gpuparse.nifti import nifti_bytes, nifti_stem, read_nifti

AFFINE = np.diag([-1.0, -1.0, 2.0, 1.0])
IMAGE = np.ascontiguousarray(phantom()[0].T)


@pytest.fixture
def path(tmp_path):
    return write_nifti(tmp_path / "case.nii.gz", IMAGE, AFFINE)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image], ids=["version 1", "version 2"])
def test_voxels_come_back_as_nibabel_wrote_them(tmp_path, dtype, suffix, kind):
    path = tmp_path / f"case{suffix}"
    nibabel.save(kind(np.abs(IMAGE).astype(dtype), AFFINE, dtype=dtype), path)
    scan = read_nifti(path)
    assert scan.values.dtype == dtype
    np.testing.assert_array_equal(scan.values, nibabel.load(path).get_fdata())
    np.testing.assert_array_equal(scan.affine, AFFINE)
    assert nifti_bytes(path) == scan.values.nbytes


def test_scaled_values_keep_their_scale(tmp_path):
    image = nibabel.Nifti1Image(IMAGE.astype(np.float32) / 7, AFFINE)
    image.set_data_dtype(np.int16)  # nibabel chooses slope and intercept
    nibabel.save(image, tmp_path / "case.nii")
    scan = read_nifti(tmp_path / "case.nii")
    assert scan.values.dtype == np.int16
    slope, intercept = scan.rescale
    np.testing.assert_array_equal(
        scan.values * slope + intercept, nibabel.load(tmp_path / "case.nii").get_fdata(dtype=np.float64)
    )


def test_compression_is_seen_from_the_bytes_not_from_the_name(path):
    path.write_bytes(gzip.decompress(path.read_bytes()))
    np.testing.assert_array_equal(read_nifti(path).values, IMAGE)


def test_big_endian_files_are_read(tmp_path):
    header = nibabel.Nifti1Header(endianness=">")
    header.set_data_dtype(np.int16)
    nibabel.save(nibabel.Nifti1Image(IMAGE, AFFINE, header), tmp_path / "case.nii")
    assert (tmp_path / "case.nii").read_bytes()[:4] == struct.pack(">i", 348)
    np.testing.assert_array_equal(read_nifti(tmp_path / "case.nii").values, IMAGE)


def test_a_fourth_axis_of_length_one_is_dropped(tmp_path):
    scan = read_nifti(write_nifti(tmp_path / "case.nii", IMAGE[..., None], AFFINE))
    np.testing.assert_array_equal(scan.values, IMAGE)


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.99])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_files_cut_short_are_refused(tmp_path, keep, suffix):
    path = write_nifti(tmp_path / f"case{suffix}", IMAGE, AFFINE)
    raw = path.read_bytes()
    path.write_bytes(raw[: int(keep * len(raw))])
    with pytest.raises(VolumeFormatError, match=rf"case\{suffix}: .*(cut short|no NIfTI|damaged)"):
        read_nifti(path)


def test_a_broken_checksum_is_noticed(path):
    raw = path.read_bytes()
    path.write_bytes(raw[:-8] + b"\0\0\0\0" + raw[-4:])
    with pytest.raises(VolumeFormatError, match=r"damaged NIfTI.*CRC"):
        read_nifti(path)


def write_header(path, *, compress=True, tail=b"", **fields):
    header = nibabel.Nifti1Header()
    header.set_data_dtype(np.int16)
    header["magic"] = b"n+1"
    header["vox_offset"] = 352
    header["sform_code"] = 1
    header["srow_x"], header["srow_y"], header["srow_z"] = AFFINE[:3]
    for key, value in fields.items():
        header[key] = value
    raw = header.binaryblock + b"\0\0\0\0" + tail
    path.write_bytes(gzip.compress(raw) if compress else raw)
    return path


@pytest.mark.parametrize("compress", [True, False])
def test_a_header_that_promises_too_much_takes_no_memory(tmp_path, compress):
    path = write_header(tmp_path / "bomb.nii", compress=compress, dim=[3, 30000, 30000, 4, 1, 1, 1, 1])
    with pytest.raises(VolumeFormatError, match=r"its header says 7200000000 bytes of voxels.*cannot hold"):
        read_nifti(path)
    with pytest.raises(VolumeFormatError, match=r"declare 6\.71 GiB; expected at most 1 GiB"):
        read_nifti(path, 1 << 30)


def test_a_tail_without_end_is_not_read(tmp_path):
    path = write_header(tmp_path / "x.nii.gz", dim=[3, 2, 2, 2, 1, 1, 1, 1], tail=b"\0" * (1 << 25))
    with pytest.raises(VolumeFormatError, match="goes on after the voxels"):
        read_nifti(path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dim": [3, 0, 4, 4, 1, 1, 1, 1]}, r"empty, its shape is \(0, 4, 4\)"),
        ({"dim": [2, 4, 4, 1, 1, 1, 1, 1]}, r"2 axes, shape \(4, 4\)"),
        ({"dim": [3, 2, 2, 2, 1, 1, 1, 1], "srow_x": [0, 0, 0, 0]}, "its sform gives voxels no volume"),
        ({"dim": [3, 2, 2, 2, 1, 1, 1, 1], "srow_y": [0, np.nan, 0, 0]}, "its sform gives voxels no volume"),
        (
            {"dim": [3, 2, 2, 2, 1, 1, 1, 1], "sform_code": 0, "pixdim": [1, 1, 0, 1, 0, 0, 0, 0]},
            r"voxel size \[1\.0, 0\.0, 1\.0\]; expected above 0",
        ),
        ({"dim": [3, 2, 2, 2, 1, 1, 1, 1], "datatype": 12345}, "damaged NIfTI"),
    ],
)
def test_headers_that_make_no_sense_are_refused(tmp_path, fields, message):
    path = write_header(tmp_path / "x.nii.gz", tail=b"\0" * 64, **fields)
    with pytest.raises(VolumeFormatError, match=message):
        read_nifti(path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((3, 4, 5, 2), np.int16), r"4 axes, shape \(3, 4, 5, 2\); expected one volume"),
        (np.zeros((3, 4, 5), np.complex64), "voxels of type complex64"),
        (np.zeros((3, 4, 5), [("R", "u1"), ("G", "u1"), ("B", "u1")]), "expected whole or real numbers"),
    ],
)
def test_what_is_no_grey_volume_is_refused(tmp_path, values, message):
    with pytest.raises(VolumeFormatError, match=rf"x\.nii\.gz: .*{message}"):
        read_nifti(write_nifti(tmp_path / "x.nii.gz", values, AFFINE))


def test_other_files_are_refused(tmp_path):
    (tmp_path / "x.nii").write_bytes(b"not an image" * 100)
    with pytest.raises(VolumeFormatError, match="no NIfTI file"):
        read_nifti(tmp_path / "x.nii")
    nibabel.save(nibabel.Nifti1Pair(IMAGE, AFFINE), tmp_path / "pair.hdr")
    (tmp_path / "pair.nii").write_bytes((tmp_path / "pair.hdr").read_bytes())
    with pytest.raises(VolumeFormatError, match=r"only the header of a \.hdr/\.img pair"):
        read_nifti(tmp_path / "pair.nii")
    with pytest.raises(VolumeFormatError, match="cannot be read"):
        read_nifti(tmp_path / "absent.nii.gz")


def test_damage_anywhere_is_an_error_of_ours_or_harmless(path):
    raw = gzip.decompress(path.read_bytes())
    random = np.random.default_rng(11)
    for _ in range(300):
        damaged = bytearray(raw)
        for at in random.integers(0, 400, random.integers(1, 6)):
            damaged[at] = random.integers(256)
        path.write_bytes(bytes(damaged))
        with contextlib.suppress(GpuparseError):
            assert read_nifti(path, 1 << 20).values.ndim == 3


def test_a_missing_package_is_named_with_the_remedy(path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "nibabel", None)
    with pytest.raises(MissingDependencyError, match=r"nibabel is needed to read NIfTI.*gpuparse\[formats\]"):
        read_nifti(path)


def test_stems():
    from pathlib import Path

    names = ("a.nii", "a.b.nii.gz", "A.NII.GZ", "a.gz", ".nii", "a.npz")
    assert [nifti_stem(Path(name)) for name in names] == ["a", "a.b", "A", None, None, None]


def test_what_the_system_does_not_show_is_not_called_damaged(path):
    message = r"case\.nii\.gz: cannot be read: \[Errno 13\] Permission denied: .*\. Check permissions, the disk and its"
    with forbidden(path), pytest.raises(VolumeFormatError, match=message):
        read_nifti(path)


def test_want_of_memory_is_no_damage(path, monkeypatch):
    def failing(*_):
        raise MemoryError("Unable to allocate 15 GiB")

    monkeypatch.setattr("nibabel.arrayproxy.ArrayProxy.get_unscaled", failing)
    with pytest.raises(MemoryError, match=r"^Unable to allocate 15 GiB$"):
        read_nifti(path)


def test_a_length_in_a_header_that_no_memory_holds_is_damage(path, monkeypatch):
    """It is met while cases are listed, where want of memory would end the run."""

    def failing(*_, **__):
        raise MemoryError

    monkeypatch.setattr("nibabel.nifti1.Nifti1Header.from_fileobj", failing)
    for read in (read_nifti, nifti_bytes):
        with pytest.raises(VolumeFormatError, match=r"case\.nii\.gz: damaged NIfTI \(MemoryError: \)\. Copy or export"):
            read(path)
