"""Encoding: against the reference's own output, against cv2, and every build of the kernel against every other."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import numpy as np
import pytest
from blocks import STEPS, in_steps_of
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracle import HAS_IPP, encode_with_cv2, gather, neighbours, pad_as_reference, pad_to_square

import gpuparse
from gpuparse import kernels
from gpuparse.encode import encode, encode_masks, encode_planes, num_image_elements
from gpuparse.errors import GpuparseError, InputError
from gpuparse.read import ChunkReader, SliceKey, decode_on_host
from gpuparse.store import open_store
from gpuparse.views import PLANE_DTYPE, check_size, resampling_tables, view_geometry

RNG = np.random.default_rng(0)


def noise(shape, high=256, dtype=np.uint8):
    return RNG.integers(0, high, shape).astype(dtype)


def assert_near_cv2(encoded, expected, smallest_side):
    """At most one grey level from cv2, and almost nowhere that.

    cv2 takes IPP's arithmetic, which the kernel has too, from four source pixels a side; below, and where it has none,
    its own fixed-point arithmetic rounds some pixels to the neighbouring level.
    """
    difference = np.abs(encoded.astype(np.int16) - expected)
    assert difference.max() <= 1
    if smallest_side >= 4 and HAS_IPP:
        assert np.count_nonzero(difference) <= max(4, encoded.size / 100_000)


@pytest.mark.parametrize("dataset", ["AMOS", "BRATS", "CAMUS"])
def test_real_slices_are_those_that_the_reference_made(golden_dir, volumes_dir, dataset):
    with np.load(golden_dir / f"{dataset}.npz", allow_pickle=False) as golden:
        axis, positions, images, masks = (golden[k] for k in ("axes", "index", "image_ipp", "mask"))
    (path,) = (volumes_dir / dataset / "train").glob("*.npz")
    with np.load(path, allow_pickle=False) as volume:
        encoded = encode(volume["imgs"], volume["gts"], positions=positions, axis=int(axis[0]), recipe="reference")
    difference = np.abs(encoded.image.astype(np.int16) - images)
    assert difference.max() <= 1
    assert np.count_nonzero(difference) < difference.size / 100_000
    np.testing.assert_array_equal(encoded.mask, masks)


@settings(max_examples=40)
@given(
    height=st.integers(1, 2000), width=st.integers(1, 2000), depth=st.integers(1, 3), axis=st.integers(0, 2),
    size=st.sampled_from([(512, 512), (512, 512), (64, 200), (333, 31), (1, 1)]), seed=st.integers(0, 99),
)  # fmt: skip
@example(height=1, width=1, depth=1, axis=0, size=(512, 512), seed=0)
@example(height=2, width=3, depth=2, axis=1, size=(512, 512), seed=0)
@example(height=2000, width=1, depth=3, axis=2, size=(512, 512), seed=0)
@example(height=512, width=512, depth=3, axis=0, size=(512, 512), seed=0)
@example(height=511, width=512, depth=3, axis=0, size=(512, 512), seed=0)  # one pixel off square, then stretched
@example(height=1999, width=2000, depth=1, axis=1, size=(512, 512), seed=0)
def test_any_slice_is_that_of_cv2(height, width, depth, axis, size, seed):
    rng = np.random.default_rng(seed)
    shape = [height, width]
    shape.insert(axis, depth)
    image = rng.integers(0, 256, shape, np.uint8)
    labels = rng.integers(0, 300, shape).astype(np.uint16)
    position = int(rng.integers(depth))
    encoded = encode(image, labels, positions=[position], axis=axis, size=size, recipe="reference")
    expected, masks = encode_with_cv2(image, labels, axis=axis, positions=[position], size=size)
    padded = pad_as_reference(image.take(position, axis))
    assert_near_cv2(encoded.image, expected, min(padded.shape))
    np.testing.assert_array_equal(encoded.mask, masks)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("num_slices", [1, 2, 3, 5])
def test_neighbours_are_reflected_at_the_ends(axis, num_slices):
    shape = [37, 52]
    shape.insert(axis, num_slices)
    image = noise(shape)
    encoded = encode(image, axis=axis, size=(40, 40))
    assert encoded.mask is None
    assert repr(encoded) == f"EncodedSlices(image=({num_slices}, 3, 40, 40) uint8, mask=None)"
    centre = encoded.image[:, 0]
    for i in range(num_slices):
        np.testing.assert_array_equal(encoded.image[i], centre[neighbours(i, num_slices)])
    if num_slices > 1:
        assert not np.array_equal(centre[0], centre[1])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32])
@pytest.mark.parametrize("recipe", ["corrected", "reference"])
def test_masks_keep_their_ids_and_width(dtype, recipe):
    image = noise((3, 33, 50))
    labels = RNG.choice(np.array([0, 1, np.iinfo(dtype).max], dtype), image.shape)
    encoded = encode(image, labels, size=(100, 90), recipe=recipe)
    pad = pad_as_reference if recipe == "reference" else pad_to_square
    _, expected = encode_with_cv2(image, labels, axis=0, positions=range(3), size=(100, 90), pad=pad)
    assert encoded.mask.dtype == dtype
    np.testing.assert_array_equal(encoded.mask, expected)


@pytest.mark.parametrize(("height", "width"), [(40, 57), (57, 40), (41, 41), (7, 60), (200, 301)])
def test_the_corrected_recipe_pads_to_a_square(height, width):
    image = noise((2, height, width))
    encoded = encode(image, image, positions=[1], size=(128, 128))
    expected, masks = encode_with_cv2(image, image, axis=0, positions=[1], size=(128, 128), pad=pad_to_square)
    assert_near_cv2(encoded.image, expected, max(height, width))
    np.testing.assert_array_equal(encoded.mask, masks)
    differs = not np.array_equal(encode(image, positions=[1], size=(128, 128), recipe="reference").image, encoded.image)
    assert differs == ((height - width) % 2 == 1)


def test_slices_of_the_wanted_size_are_copied():
    image = noise((2, 64, 61))
    encoded = encode(image, image, size=(64, 64))
    np.testing.assert_array_equal(encoded.image[0, 0], np.pad(image[0], ((0, 0), (1, 2))))
    np.testing.assert_array_equal(encoded.mask[1], np.pad(image[1], ((0, 0), (1, 2))))


def test_positions_choose_and_order_and_may_repeat():
    image, labels = noise((5, 20, 30)), noise((5, 20, 30), 4)
    every = encode(image, labels, size=(32, 48))
    some = encode(image, labels, positions=np.array([4, 0, 4]), size=(32, 48))
    np.testing.assert_array_equal(some.image, every.image[[4, 0, 4]])
    np.testing.assert_array_equal(some.mask, every.mask[[4, 0, 4]])
    none = encode(image, labels, positions=[], size=(32, 48))
    assert (none.image.shape, none.mask.shape) == ((0, 3, 32, 48), (0, 32, 48))


def test_arrays_need_not_be_contiguous():
    image = noise((5, 20, 30))
    for view in (np.asfortranarray(image), noise((10, 20, 30))[::-2], image[:, 3:, ::2], image.transpose(2, 0, 1)):
        before = view.copy()
        encoded = encode(view, view, size=(32, 32))
        expected = encode(np.ascontiguousarray(view), np.ascontiguousarray(view), size=(32, 32))
        np.testing.assert_array_equal(encoded.image, expected.image)
        np.testing.assert_array_equal(encoded.mask, expected.mask)
        np.testing.assert_array_equal(view, before)


def planes_of_a_store(sample_stores):
    """Decoded slices of chunked volumes, semantic and instance, one and three views, as the kernels see them."""
    keys = []
    for name, axes in (("SAMPLE_CT", (0,)), ("SAMPLE_CELLS", (0, 1, 2))):
        store = open_store(sample_stores[name])
        for axis in axes:
            keys += [SliceKey(store, 1, axis, position) for position in (0, 13, store.cases[1].shape[axis] - 1)]
    slices = ChunkReader().fetch(keys, (96, 130))
    return keys, slices, decode_on_host(slices), resampling_tables(slices.lengths)


def test_chunked_slices_are_encoded_as_those_in_memory(sample_stores, sample_dir):
    keys, slices, arena, tables = planes_of_a_store(sample_stores)
    images = encode_planes(arena, slices.blocks, slices.image_planes, tables, (96, 130)).reshape(-1, 3, 96, 130)
    masks = encode_masks(arena, slices.blocks, slices.label_planes, tables, (96, 130))
    assert masks.dtype == np.uint32
    assert masks.max() > 255
    for key, image, mask in zip(keys, images, masks, strict=True):
        name = f"{key.store.name}/train/{key.store.cases[key.case].name}.npz"
        with np.load(sample_dir / name, allow_pickle=False) as volume:
            expected = encode(volume["imgs"], volume["gts"], positions=[key.position], axis=key.axis, size=(96, 130))
        np.testing.assert_array_equal(image, expected.image[0], err_msg=key.describe())
        np.testing.assert_array_equal(mask, expected.mask[0], err_msg=key.describe())


def test_masks_of_chunked_slices_are_the_gathered_ones(sample_stores):
    _, slices, arena, tables = planes_of_a_store(sample_stores)
    masks = encode_masks(arena, slices.blocks, slices.label_planes, tables, (96, 130))
    for plane, mask in zip(slices.label_planes, masks, strict=True):
        square = pad_to_square(gather(arena, slices.blocks, plane))
        rows, columns = (tables.nearest[plane[name]] for name in ("row_table", "column_table"))
        np.testing.assert_array_equal(mask, square[rows[:96, None], columns[:130]])


def planes_of_a_volume(image, axis, size, recipe):
    """All slices of a volume in memory as planes of one block each."""
    view = view_geometry(image.shape, axis, recipe)
    rows, columns = (i for i in range(3) if i != axis)
    planes = np.zeros(view.num_slices, PLANE_DTYPE)
    for field in ("height", "width", "pad_top", "pad_left", "padded_height", "padded_width"):
        planes[field] = getattr(view, field)
    planes["first_block"] = np.arange(view.num_slices)
    planes["row_stride"], planes["column_stride"] = image.strides[rows], image.strides[columns]
    planes["block_height"], planes["block_width"] = view.height, view.width
    planes["blocks_per_row"] = planes["itemsize"] = planes["column_table"] = 1
    blocks = np.arange(view.num_slices) * image.strides[axis]
    tables = resampling_tables(((view.padded_height, size[0]), (view.padded_width, size[1])))
    return SimpleNamespace(blocks=blocks, image_planes=planes, label_planes=planes), tables


def run_library(library, function, slices, arena, tables, size, *, num_threads=None):
    """Calls one exported function: the driver with `num_threads`, or the per-element loop without."""
    masks = "mask" in function
    planes = slices.label_planes if masks else slices.image_planes
    out = np.full((len(planes), *size), 77, np.uint32 if masks else np.uint8)
    # An element is a pixel of a mask, or a thread's share of a tile of an image.
    head = [ctypes.c_int64(out.size if masks else num_image_elements(len(planes), size))]
    if num_threads is not None:
        head = [ctypes.c_int64(len(planes)), ctypes.c_int32(num_threads)]
    arrays = (tables.nearest,) if masks else (tables.cubic_index, tables.cubic_weights)
    getattr(library, function)(
        *head,
        *(kernels.pointer(a) for a in (arena, slices.blocks, planes, *arrays)),
        *(ctypes.c_int32(n) for n in (tables.length, *size)),
        kernels.pointer(out),
    )
    return out


def avx2_or_skip():
    if not kernels.host_library("baseline").gpuparse_supports_avx2():
        pytest.skip("this processor has no AVX2")
    return kernels.host_library("avx2")


@pytest.mark.parametrize("driver", ["gpuparse_encode", "gpuparse_encode_mask"])
def test_every_build_and_thread_count_gives_the_bits_of_the_kernels_body(sample_stores, driver):
    # The body, one element at a time, is what the GPU runs; the drivers are the CPU's faster order of the same work.
    body = driver.removeprefix("gpuparse_") + "_elements"
    _, slices, arena, tables = planes_of_a_store(sample_stores)
    baseline, avx2 = kernels.host_library("baseline"), avx2_or_skip()
    expected = run_library(baseline, body, slices, arena, tables, (96, 130))
    np.testing.assert_array_equal(run_library(avx2, body, slices, arena, tables, (96, 130)), expected)
    for library in (baseline, avx2):
        for num_threads in (1, 2, 7):
            got = run_library(library, driver, slices, arena, tables, (96, 130), num_threads=num_threads)
            np.testing.assert_array_equal(got, expected)


@settings(max_examples=25)
@given(
    height=st.integers(1, 90), width=st.integers(1, 90), rows=st.integers(1, 90), columns=st.integers(1, 90),
    axis=st.integers(0, 2), recipe=st.sampled_from(["corrected", "reference"]),
)  # fmt: skip
@example(height=1, width=1, rows=9, columns=9, axis=0, recipe="corrected")
@example(height=64, width=63, rows=64, columns=63, axis=2, recipe="reference")  # equal sizes: the copy path
@example(height=96, width=320, rows=320, columns=320, axis=0, recipe="corrected")  # copied by words, behind padding
@example(height=300, width=320, rows=40, columns=300, axis=1, recipe="corrected")  # a tile in several parts
@example(height=4, width=5000, rows=3, columns=280, axis=0, recipe="corrected")  # not even a row of a tile fits
@example(height=2500, width=9, rows=300, columns=5, axis=2, recipe="reference")
def test_builds_agree_for_any_shape(height, width, rows, columns, axis, recipe):
    baseline, avx2 = kernels.host_library("baseline"), avx2_or_skip()
    shape = [height, width]
    shape.insert(axis, 3)
    image = np.random.default_rng(height * width).integers(0, 256, shape, np.uint8)
    slices, tables = planes_of_a_volume(image, axis, (rows, columns), recipe)
    arena = image.reshape(-1)
    for driver in ("gpuparse_encode", "gpuparse_encode_mask"):
        body = driver.removeprefix("gpuparse_") + "_elements"
        expected = run_library(baseline, body, slices, arena, tables, (rows, columns))
        for step in STEPS:
            with in_steps_of(baseline, step):
                got = run_library(baseline, body, slices, arena, tables, (rows, columns))
            np.testing.assert_array_equal(got, expected)
        for library in (baseline, avx2):
            got = run_library(library, driver, slices, arena, tables, (rows, columns), num_threads=1)
            np.testing.assert_array_equal(got, expected)


def test_a_row_of_a_volume_may_be_longer_than_4_gib():
    side = 70_000
    arena = np.zeros(side * side, np.uint8)  # most of it is never touched, and takes no memory
    plane = np.zeros(1, PLANE_DTYPE)
    plane["height"] = plane["padded_height"] = plane["block_height"] = 1
    plane["width"] = plane["padded_width"] = plane["block_width"] = side
    plane["row_stride"], plane["column_stride"] = 1, side
    plane["blocks_per_row"] = plane["itemsize"] = plane["column_table"] = 1
    arena[65_536 * side :: side] = 200
    slices = SimpleNamespace(blocks=np.zeros(1, np.int64), image_planes=plane)
    tables = resampling_tables(((1, 8), (side, 64)))
    library = kernels.host_library("baseline")
    expected = run_library(library, "gpuparse_encode", slices, arena, tables, (8, 64), num_threads=1)
    assert expected[0, 0, -4:].tolist() == [200] * 4
    np.testing.assert_array_equal(run_library(library, "encode_elements", slices, arena, tables, (8, 64)), expected)


@pytest.mark.parametrize("num_threads", [1, 2, 3, 16, None])
def test_thread_counts_give_the_same_bits(num_threads):
    image, labels = noise((6, 70, 90)), noise((6, 70, 90), 9)
    expected = encode(image, labels, size=(128, 100), num_threads=1)
    got = encode(image, labels, size=(128, 100), num_threads=num_threads)
    np.testing.assert_array_equal(got.image, expected.image)
    np.testing.assert_array_equal(got.mask, expected.mask)


class StandIn:
    """What a CuPy array looks like to the argument checks."""

    ndim, shape, dtype = 3, (3, 8, 8), np.dtype(np.uint8)


StandIn.__module__ = "cupy"
VOLUME = np.zeros((3, 8, 8), np.uint8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image": [[[0]]]}, r"image is list; expected a numpy or CuPy array \(z, y, x\)"),
        ({"image": VOLUME[0]}, r"image has shape \(8, 8\); expected three axes \(z, y, x\), none empty"),
        ({"image": VOLUME[:0]}, r"image has shape \(0, 8, 8\); expected three axes \(z, y, x\), none empty"),
        ({"image": VOLUME.astype(np.float32)}, r"image has dtype float32; expected uint8"),
        ({"labels": VOLUME.astype(np.int64)}, r"labels has dtype int64; expected uint8 or uint16 or uint32"),
        ({"labels": VOLUME.astype(">u2")}, r"labels has dtype >u2; expected uint8 or uint16 or uint32"),
        ({"labels": "mask"}, r"labels is str; expected a numpy or CuPy array"),
        ({"labels": VOLUME[:2]}, r"labels have shape \(2, 8, 8\); expected the image's, \(3, 8, 8\)"),
        ({"labels": StandIn()}, r"labels is a cupy array; expected it on the same device as the image"),
        ({"image": StandIn(), "labels": VOLUME}, r"labels is a numpy array; expected it on the same device"),
        ({"positions": [0, 3]}, r"slice position 3 is outside 0\.\.2"),
        ({"positions": [-1]}, r"slice position -1 is outside 0\.\.2"),
        ({"positions": 2}, r"positions has shape \(\); expected a row of slices, whole numbers from 0 to 2"),
        ({"positions": ["a"]}, r"positions is \['a'\]; expected a row of slices, whole numbers from 0 to 2"),
        ({"positions": [1.7]}, r"positions is \[1\.7\]; expected a row of slices"),
        ({"positions": [True, False, True]}, r"positions is \[True, False, True\]; expected a row of slices"),
        ({"positions": [2**70]}, r"positions is \[1180591620717411303424\]; expected a row of slices"),
        ({"axis": 1.0}, r"axis is 1\.0; expected 0, 1 or 2 \(z, y or x\)"),
        ({"axis": None}, r"axis is None; expected 0, 1 or 2"),
        ({"num_threads": "2"}, r"num_threads is '2'; expected a whole number of at least 1, or None for all cores"),
        ({"num_threads": -1}, r"num_threads is -1; expected a whole number of at least 1, or None for all cores"),
        ({"axis": 3}, r"axis is 3; expected 0, 1 or 2"),
        ({"recipe": "cv2"}, r"recipe is 'cv2'; expected 'corrected' or 'reference'"),
        ({"size": 512}, r"size is 512; expected \(rows, columns\), such as \(512, 512\)"),
        ({"size": (512,)}, r"size is \(512,\); expected \(rows, columns\)"),
        ({"size": (512, 512, 3)}, r"size is \(512, 512, 3\); expected \(rows, columns\)"),
        ({"size": ("a", "b")}, r"size is \('a', 'b'\); expected \(rows, columns\)"),
        ({"size": (0, 512)}, r"size is \(0, 512\); expected 1 to 16384 pixels a side"),
        ({"size": (512, 16385)}, r"size is \(512, 16385\); expected 1 to 16384 pixels a side"),
    ],
)
def test_unusable_arguments_are_refused(arguments, message):
    with pytest.raises(InputError, match=message) as error:
        encode(**{"image": VOLUME, **arguments})
    assert isinstance(error.value, GpuparseError)


def test_sizes_of_any_integer_kind_pass():
    assert check_size(np.array([3, 4])) == (3, 4)
    assert check_size([16384, 1]) == (16384, 1)
    assert gpuparse.encode is encode


@pytest.mark.gpu
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32])
def test_the_gpu_gives_the_cpus_bits(axis, dtype):
    import cupy

    image = noise((40, 61, 83))
    labels = RNG.integers(0, np.iinfo(dtype).max, image.shape, dtype, endpoint=True)
    for size in ((512, 512), (70, 33), (83, 83)):
        for recipe in ("corrected", "reference"):
            expected = encode(image, labels, axis=axis, size=size, recipe=recipe)
            got = encode(cupy.asarray(image), cupy.asarray(labels), axis=axis, size=size, recipe=recipe)
            np.testing.assert_array_equal(got.image.get(), expected.image)
            np.testing.assert_array_equal(got.mask.get(), expected.mask)
            assert got.mask.dtype == dtype


@pytest.mark.gpu
def test_the_gpu_gives_the_cpus_bits_for_chunked_slices_on_any_stream(sample_stores):
    import cupy

    _, slices, arena, tables = planes_of_a_store(sample_stores)
    arguments = (tables, (96, 130))
    with cupy.cuda.Stream(non_blocking=True) as stream:
        on_device = cupy.asarray(arena)
        images = encode_planes(on_device, slices.blocks, slices.image_planes, *arguments)
        masks = encode_masks(on_device, slices.blocks, slices.label_planes, *arguments)
        stream.synchronize()
    np.testing.assert_array_equal(images.get(), encode_planes(arena, slices.blocks, slices.image_planes, *arguments))
    np.testing.assert_array_equal(masks.get(), encode_masks(arena, slices.blocks, slices.label_planes, *arguments))
