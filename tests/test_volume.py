"""Reading raw cases: what arrives, in which type, and what is refused and how."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gpuparse.errors import GpuparseError, VolumeFormatError
from gpuparse.volume import check_name, declared_bytes, read_arrays, read_volume

SHAPE = (3, 4, 5)


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 256, SHAPE, np.uint8)


def npz_with_headers(*, imgs: bytes, spacing: bytes | None = None) -> bytes:
    """An npz whose arrays have the given header texts and eight bytes of data: what np.savez would not write."""
    plain = b"{'descr': '|u1', 'fortran_order': False, 'shape': (1, 1, 1)}\n"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for key, header in (("imgs", imgs), ("gts", plain), ("spacing", spacing or plain)):
            archive.writestr(f"{key}.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(8))
    return buffer.getvalue()


def test_values_names_and_digest_are_those_of_the_file(write_case, image):
    labels = np.random.default_rng(1).integers(0, 4, SHAPE).astype(np.uint8)
    path = write_case(image, labels, spacing=(0.7, 0.8, 5.0), name="case 1.5mm")
    volume = read_volume(str(path))
    assert volume.name == "case 1.5mm"
    np.testing.assert_array_equal(volume.image, image)
    np.testing.assert_array_equal(volume.labels, labels)
    assert volume.image.dtype == volume.labels.dtype == np.uint8
    assert volume.spacing_mm == (5.0, 0.8, 0.7)  # the file has x, y, z; arrays are z, y, x
    assert volume.source_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert volume.source_bytes == path.stat().st_size


def test_the_real_or_generated_volumes_are_read_as_numpy_reads_them(volumes_dir):
    for path in sorted(volumes_dir.glob("*/train/*.npz")):
        volume = read_volume(path)
        with np.load(path, allow_pickle=False) as arrays:
            np.testing.assert_array_equal(volume.image, arrays["imgs"])
            np.testing.assert_array_equal(volume.labels, arrays["gts"])
            assert volume.spacing_mm == tuple(arrays["spacing"].tolist()[::-1])


def test_compressed_and_fortran_ordered_arrays_come_out_the_same(tmp_path, image):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, imgs=np.asfortranarray(image), gts=np.asfortranarray(image), spacing=[1, 2, 3])
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.image, image)
    np.testing.assert_array_equal(volume.labels, image)
    assert volume.image.flags.c_contiguous
    assert volume.labels.flags.c_contiguous
    assert volume.spacing_mm == (3.0, 2.0, 1.0)


@pytest.mark.parametrize("dtype", ["<i2", ">i2", "<u2", "<i4", "<i8", ">u4", "<f4", "<f8", ">f8", "<f2"])
def test_images_of_other_number_types_become_uint8(write_case, image, dtype):
    volume = read_volume(write_case(image.astype(dtype)))
    assert volume.image.dtype == np.uint8
    np.testing.assert_array_equal(volume.image, image)


def test_float_images_are_truncated_as_the_references_astype_does(write_case):
    values = np.array([0.0, 0.9, 1.0, 99.5, 254.999, 255.0], np.float64).reshape(1, 2, 3)
    np.testing.assert_array_equal(read_volume(write_case(values)).image.ravel(), [0, 0, 1, 99, 254, 255])


@pytest.mark.parametrize("values", [[0.0, 1.0], [0.0, 0.0], [1.0, 1.0]])
def test_float_images_of_whole_zeros_and_ones_are_no_mistake(write_case, values):
    image = np.array(values, np.float32).reshape(1, 1, 2)
    np.testing.assert_array_equal(read_volume(write_case(image)).image, image)


@given(
    labels=st.sampled_from([np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64]).flatmap(
        lambda dtype: hnp.arrays(dtype, (1, 2, 3), elements=st.integers(0, min(int(np.iinfo(dtype).max), 2**32 - 1)))
    )
)
def test_label_ids_survive_in_the_narrowest_type_that_holds_them(tmp_path_factory, labels):
    path = tmp_path_factory.getbasetemp() / "labels.npz"
    np.savez(path, imgs=np.zeros(labels.shape, np.uint8), gts=labels, spacing=[1, 1, 1])
    read = read_volume(path).labels
    np.testing.assert_array_equal(read, labels)
    highest = int(labels.max())
    narrowest = "uint8" if highest < 2**8 else "uint16" if highest < 2**16 else "uint32"
    assert read.dtype == narrowest


@pytest.mark.parametrize("highest", [255, 256, 65535, 65536, 2**32 - 1])
def test_the_widths_change_exactly_at_their_limits(write_case, highest):
    labels = np.array([0, highest], np.int64).reshape(1, 1, 2)
    read = read_volume(write_case(np.zeros((1, 1, 2), np.uint8), labels)).labels
    assert read.ravel().tolist() == [0, highest]
    assert read.itemsize == (1 if highest < 2**8 else 2 if highest < 2**16 else 4)


def test_boolean_and_whole_float_labels_are_ids(write_case):
    flags = np.array([True, False]).reshape(1, 1, 2)
    assert read_volume(write_case(flags.astype(np.uint8), flags)).labels.ravel().tolist() == [1, 0]
    whole = np.array([300.0, 0.0]).reshape(1, 1, 2)
    assert read_volume(write_case(flags.astype(np.uint8), whole)).labels.ravel().tolist() == [300, 0]


def test_a_pickled_member_beside_the_arrays_is_left_alone(write_case, image, trap):
    path = write_case(image, text_prompts=np.array({"1": trap}, dtype=object))
    np.testing.assert_array_equal(read_volume(path).image, image)
    assert not trap.path.exists()
    with np.load(path, allow_pickle=True) as arrays:
        arrays["text_prompts"]
    assert trap.path.exists()  # the trap does work


@pytest.mark.parametrize("key", ["imgs", "gts", "spacing"])
def test_pickled_arrays_are_refused_unread(tmp_path, image, trap, key):
    members = {"imgs": image, "gts": image, "spacing": np.ones(3)}
    members[key] = np.full(SHAPE, trap, dtype=object)
    path = tmp_path / "a.npz"
    np.savez(path, **members)
    with pytest.raises(VolumeFormatError, match=rf"a\.npz: {key} holds pickled Python objects.*plain numeric array"):
        read_volume(path)
    assert not trap.path.exists()


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (["imgs"], r"a\.npz: no imgs in it, only gts, spacing\. BiomedParse expects"),
        (["gts", "spacing"], r"a\.npz: no gts, spacing in it, only imgs"),
        (["imgs", "gts", "spacing"], r"a\.npz: no imgs, gts, spacing in it, only nothing"),
    ],
)
def test_missing_arrays_are_named_with_those_present(tmp_path, image, missing, message):
    members = {"imgs": image, "gts": image, "spacing": np.ones(3)}
    path = tmp_path / "a.npz"
    np.savez(path, **{key: value for key, value in members.items() if key not in missing})
    with pytest.raises(VolumeFormatError, match=message):
        read_volume(path)


ZEROS = np.zeros(SHAPE, np.uint8)
NAN = np.full(SHAPE, 3.0)
NAN[1, 2, 3] = np.nan
OVERSHOT = np.linspace(0.5, 1.25, ZEROS.size, dtype=np.float32).reshape(ZEROS.shape)  # resampled from 0..1


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"imgs": ZEROS[0]}, r"imgs has shape \(4, 5\); expected three axes \(z, y, x\).*leading axis of length 1"),
        ({"gts": ZEROS[None]}, r"gts has shape \(1, 3, 4, 5\); expected three axes"),
        ({"gts": ZEROS[:2]}, r"imgs has shape \(3, 4, 5\) and gts \(2, 4, 5\); they must be equal\. Resample"),
        ({"imgs": ZEROS[:0]}, r"imgs is empty, its shape is \(0, 4, 5\)\. Export the case again"),
        ({"gts": ZEROS[..., :0]}, r"gts is empty, its shape is \(3, 4, 0\)"),
        ({"imgs": ZEROS.astype("U3")}, r"imgs has dtype <U3; expected numbers"),
        ({"gts": ZEROS.astype(np.complex64)}, r"gts has dtype complex64; expected numbers"),
        ({"spacing": np.array(["1", "1", "1"])}, r"spacing has dtype <U1; expected numbers"),
        ({"imgs": ZEROS - 1.0}, r"imgs \(float64\) has values -1\.0\.\.-1\.0; expected 0\.\.255\. Apply the intensity"),
        ({"imgs": ZEROS + np.float32(255.5)}, r"imgs \(float32\) has values 255\.5\.\.255\.5; expected 0\.\.255"),
        ({"imgs": ZEROS.astype(np.int16) - 1024}, r"imgs \(int16\) has values -1024\.\.-1024; expected 0\.\.255"),
        ({"imgs": NAN}, r"imgs \(float64\) has NaN or infinite values; expected 0\.\.255\. Set them to the"),
        ({"imgs": ZEROS + np.inf}, r"imgs \(float64\) has NaN or infinite values; expected 0\.\.255"),
        ({"imgs": ZEROS + 0.5}, r"imgs \(float64\) has values 0\.5\.\.0\.5, scaled to 0\.\.1.*Multiply by 255"),
        ({"imgs": OVERSHOT}, r"imgs \(float32\) has values 0\.5\.\.1\.25, scaled to 0\.\.1.*Multiply by 255"),
        ({"gts": ZEROS.astype(np.int16) - 1}, r"gts has negative ids \(lowest -1\).*Map ignored voxels to 0"),
        ({"gts": ZEROS + np.int64(2**32)}, r"gts has ids up to 4294967296; expected at most 2\^32-1\. Renumber"),
        ({"gts": ZEROS + np.float32(2**32)}, r"gts has ids up to 4294967296\.0; expected at most 2\^32-1\. Renumber"),
        ({"gts": NAN}, r"gts \(float64\) has NaN or infinite values; expected whole numbers\. Set them to 0"),
        ({"gts": ZEROS - np.inf}, r"gts \(float64\) has NaN or infinite values; expected whole numbers"),
        ({"gts": ZEROS + 1.5}, r"gts \(float64\) has fractional ids; expected whole numbers\. Round them"),
        ({"spacing": np.ones(2)}, r"spacing is \[1\.0, 1\.0\]; expected three positive millimetre values"),
        ({"spacing": np.array([1.0, 0.0, 1.0])}, r"spacing is \[1\.0, 0\.0, 1\.0\]; expected three positive"),
        ({"spacing": np.array([1.0, 1.0, -2.0])}, r"spacing is \[1\.0, 1\.0, -2\.0\]; expected three positive"),
        ({"spacing": np.array([np.nan, 1.0, 1.0])}, r"spacing is \[nan, 1\.0, 1\.0\]; expected three positive"),
        ({"spacing": np.array([np.inf, 1.0, 1.0])}, r"spacing is \[inf, 1\.0, 1\.0\].*Take them from the image's"),
    ],
)
def test_unusable_arrays_are_refused_with_file_value_and_remedy(tmp_path, members, message):
    path = tmp_path / "a.npz"
    np.savez(path, **{"imgs": ZEROS, "gts": ZEROS, "spacing": np.ones(3), **members})
    with pytest.raises(VolumeFormatError, match=rf"a\.npz: {message}") as error:
        read_volume(path)
    assert isinstance(error.value, GpuparseError)
    assert isinstance(error.value, ValueError)


def test_a_spacing_as_long_as_a_volume_is_refused_by_its_header(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, imgs=ZEROS, gts=ZEROS, spacing=np.zeros((2**20 + 1,), np.uint8))
    with pytest.raises(VolumeFormatError, match=r"spacing has shape \(1048577,\); expected three positive millimetre"):
        read_volume(path)


def test_a_side_beyond_31_bits_is_refused_by_its_header(tmp_path):
    path = tmp_path / "a.npz"
    path.write_bytes(npz_with_headers(imgs=b"{'descr': '|u1', 'fortran_order': False, 'shape': (2147483648, 1, 1)}\n"))
    with pytest.raises(VolumeFormatError, match=r"imgs has shape \(2147483648, 1, 1\); expected at most 2\^31-1"):
        read_volume(path)


@pytest.mark.parametrize(
    "headers",
    [
        {"imgs": b"{'descr': '|u1', 'fortran_order': False, 'shape': (1, 1, 1)"},  # numpy: TokenError
        {"imgs": b"  x\n y\n"},  # IndentationError
        {"imgs": b"{1: 2, 'a': 3}"},  # TypeError
        {"imgs": b"{'descr': '|u1', 'fortran_order': False, 'shape': (-1, 1, 1)}\n"},
        {"imgs": b"\x00" * 20},
        {  # OverflowError
            "imgs": b"{'descr': '|u1', 'fortran_order': False, 'shape': (1, 1, 1)}\n",
            "spacing": b"{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000000000000000,)}\n",
        },
    ],
)
def test_a_mangled_array_header_is_a_damaged_file_whatever_numpy_raises(tmp_path, headers):
    path = tmp_path / "a.npz"
    path.write_bytes(npz_with_headers(**headers))
    with pytest.raises(VolumeFormatError, match=r"a\.npz: damaged npz.*Copy or export it again"):
        read_volume(path)


def test_a_header_that_declares_too_little_is_noticed(tmp_path):
    # The array ends before its member does, so that reading the array alone never reaches the member's checksum.
    image = np.random.default_rng(0).integers(0, 256, (16, 32, 32)).astype("<i4")
    path = tmp_path / "a.npz"
    np.savez(path, imgs=image, gts=image.astype(np.uint8), spacing=np.ones(3))
    raw = path.read_bytes()
    assert raw.count(b"'<i4'") == 1
    path.write_bytes(raw.replace(b"'<i4'", b"'<i2'"))
    with pytest.raises(VolumeFormatError, match=r"a\.npz: damaged npz"):
        read_volume(path)


def test_a_damaged_lzma_member_is_a_damaged_file(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, imgs=ZEROS, gts=ZEROS, spacing=np.ones(3))
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    np.testing.assert_array_equal(read_volume(path).image, ZEROS)
    raw = bytearray(path.read_bytes())
    start = raw.index(b"imgs.npy") + len(b"imgs.npy")
    raw[start + 4 : start + 9] = b"\xff" * 5  # the stream's own properties
    path.write_bytes(raw)
    with pytest.raises(VolumeFormatError, match=r"a\.npz: damaged npz"):
        read_volume(path)


@pytest.mark.parametrize("compressed", [False, True])
def test_a_changed_byte_anywhere_is_noticed_or_harmless(tmp_path, image, compressed):
    path = tmp_path / "a.npz"
    save = np.savez_compressed if compressed else np.savez
    save(path, imgs=image, gts=image, spacing=[1.0, 2.0, 3.0])
    raw = path.read_bytes()
    refused = 0
    for place in range(0, len(raw), 2):
        damaged = bytearray(raw)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            volume = read_volume(path)
        except VolumeFormatError:
            refused += 1
        else:  # a date, a flag, or padding
            np.testing.assert_array_equal(volume.image, image)
            np.testing.assert_array_equal(volume.labels, image)
            assert volume.spacing_mm == (3.0, 2.0, 1.0)
    assert refused > len(raw) / 6


@pytest.mark.parametrize("compressed", [False, True])
def test_a_file_cut_anywhere_is_refused(tmp_path, image, compressed):
    path = tmp_path / "a.npz"
    save = np.savez_compressed if compressed else np.savez
    save(path, imgs=image, gts=image, spacing=[1.0, 2.0, 3.0])
    raw = path.read_bytes()
    for length in range(0, len(raw), 7):
        path.write_bytes(raw[:length])
        with pytest.raises(VolumeFormatError, match=rf"a\.npz: not a complete npz \(zip\) file of {length} bytes"):
            read_volume(path)


def test_what_cannot_be_read_at_all_is_refused(tmp_path):
    with pytest.raises(VolumeFormatError, match=r"gone\.npz: cannot be read: .*No such file"):
        read_volume(tmp_path / "gone.npz")
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(VolumeFormatError, match=r"folder\.npz: it is no regular file but a folder"):
        read_volume(tmp_path / "folder.npz")


@pytest.mark.parametrize("name", ["a", "CT_AMOS_amos_0018", "case 1", "a.b", ".hidden", "größe", "_a", "a__b"])
def test_plain_names_pass(name):
    assert check_name(name, "case name") == name


@pytest.mark.parametrize("name", ["", ".", "..", "a..b", "../a", "a/b", "a\\b", "a\nb", "a\0b", "\udcff"])
def test_names_that_could_leave_their_folder_are_refused(name):
    with pytest.raises(VolumeFormatError, match=r"dataset name .* cannot be used: expected a plain name.*Rename it"):
        check_name(name, "dataset name")


@pytest.mark.parametrize("name", ["__a", "zarr.json"])  # the second would stand where a group's metadata goes
def test_names_that_belong_to_zarr_are_refused(name):
    with pytest.raises(VolumeFormatError, match=r"case name .* cannot be used: .*Zarr's.*Rename it"):
        check_name(name, "case name")


def test_a_cases_name_is_checked_before_its_file_is_opened(tmp_path):
    with pytest.raises(VolumeFormatError, match=r"a\.\.b\.npz: case name 'a\.\.b' cannot be used"):
        read_volume(tmp_path / "a..b.npz")


@pytest.mark.parametrize("read", [read_volume, declared_bytes, lambda path: read_arrays(path, ["imgs"])])
def test_a_file_that_goes_or_fails_is_named(write_case, image, monkeypatch, read):
    path = write_case(image)

    def failing(*_, **__):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("pathlib.Path.open", failing)
    monkeypatch.setattr("pathlib.Path.read_bytes", failing)
    with pytest.raises(VolumeFormatError, match=rf"^{path}: cannot be read: \[Errno 5\] Input/output error$"):
        read(path)


@pytest.mark.parametrize("read", [read_volume, lambda path: read_arrays(path, ["imgs"])])
def test_want_of_memory_is_no_damage(write_case, image, monkeypatch, read):
    def failing(*_):
        raise MemoryError("Unable to allocate 15 GiB")

    monkeypatch.setattr("gpuparse.npz.NpzFile.read", failing)
    with pytest.raises(MemoryError, match=r"^Unable to allocate 15 GiB$"):
        read(write_case(image))
