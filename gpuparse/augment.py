"""Augmentation and labels: encoded slices and native masks in, a training batch's tensors out, in one launch.

`augment` takes arrays; `finish_batch` takes the planes that `read` describes, and is what the loaders call. Both apply
a table of parameters (`gpuparse.sampling.PARAMS_DTYPE`) and draw nothing but the noise that the table asks for.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from gpuparse import kernels
from gpuparse.arguments import check_choice, check_num_threads, whole_numbers
from gpuparse.cgroup import num_usable_cpus
from gpuparse.errors import InputError
from gpuparse.sampling import PARAMS_DTYPE
from gpuparse.views import (
    Recipe,
    ResamplingTables,
    array_planes,
    linear_table,
    nearest_indices,
    resampling_tables,
    stack_tables,
    view_geometry,
)

__all__ = [
    "AugmentedBatch",
    "FinishTables",
    "LabelSpec",
    "OutputTypes",
    "augment",
    "finish_batch",
    "launch_finish",
    "prepare_finish",
]

LabelMode = Literal["prompts", "instances", "classes", "foreground"]
# Side of the tiles that the GPU's faster kernel works in: kTileSide of kernels/augment_tiles.cu.
TILE_SIDE = 32

_MOST_GREY_LEVELS = 1e8

_MODES = {"prompts": 0, "instances": 1, "classes": 2, "foreground": 3}
_IMAGE_TYPES = {"float32": (0, np.float32), "float16": (1, np.float16), "bfloat16": (2, np.uint16)}
_LABEL_TYPES = {"int64": (0, np.int64), "uint8": (1, np.uint8)}


@dataclass(frozen=True, eq=False)
class AugmentedBatch:
    """A batch, on the device of the images it was made from.

    Attributes:
        image: (batch, 3, height, width) float32, float16, or uint16 holding bfloat16 bits; not clipped to 0..255.
        labels: (batch, num_prompts, height, width), or (batch, height, width) for one map of classes; int64 or uint8.
    """

    image: Any
    labels: Any

    def __repr__(self) -> str:
        image, labels = self.image, self.labels
        return f"AugmentedBatch(image={image.shape} {image.dtype}, labels={labels.shape} {labels.dtype})"


@dataclass(frozen=True)
class OutputTypes:
    """The element types of a batch.

    Attributes:
        image: float32, float16 or bfloat16.
        labels: int64 or uint8.
    """

    image: str = "float32"
    labels: str = "int64"

    def __post_init__(self) -> None:
        check_choice("image_dtype", self.image, _IMAGE_TYPES)
        check_choice("labels_dtype", self.labels, _LABEL_TYPES)

    @property
    def arrays(self) -> tuple[Any, Any]:
        """The numpy types of image and labels; bfloat16 travels as uint16."""
        return _IMAGE_TYPES[self.image][1], _LABEL_TYPES[self.labels][1]


@dataclass(frozen=True, eq=False)
class LabelSpec:
    """What labels to make of the masks.

    Attributes:
        class_ids: (batch, num_prompts) int32, the prompts' classes.
        modes: (batch,) int32: 0 per prompt, 1 where the id equals the prompt's class; 1 the id map as it is, once per
            prompt; 2 the id map; 3 the prompt's class where the id is not 0.
        stacked: Whether labels have a prompt axis; without one there is one map per sample.
    """

    class_ids: npt.NDArray[np.int32]
    modes: npt.NDArray[np.int32]
    stacked: bool


def augment(
    image: Any,
    mask: Any,
    params: npt.NDArray[Any],
    *,
    class_ids: npt.ArrayLike | None = None,
    labels: LabelMode = "prompts",
    recipe: Recipe = "corrected",
    image_dtype: str = "float32",
    labels_dtype: str = "int64",
    num_threads: int | None = None,
) -> AugmentedBatch:
    """Applies a parameter table to encoded slices and their masks.

    Args:
        image: (batch, 3, height, width) uint8, encoded slices; numpy (CPU) or CuPy (its GPU, on CuPy's
            current stream there).
        mask: (batch, rows, columns) uint8, uint16 or uint32 on the same device, at native size: it is padded square
            and resized by nearest neighbour as `gpuparse.encode` would (an encoded mask that is square stays as it is).
        params: (batch,) PARAMS_DTYPE, from `sample_params` or made by hand.
        class_ids: (batch, num_prompts) class ids; needed for "prompts", "instances" and "foreground".
        labels: "prompts": binary, per prompt; "instances": the id map, once per prompt; "classes": one id map;
            "foreground": one map, the first class where the mask is not 0.
        recipe: How the mask is padded: "corrected" pads an odd difference of the sides by floor before and the rest
            after; "reference" by floor on both sides, one pixel off square.
        image_dtype: "float32", "float16", or "bfloat16" (returned as its bits in uint16; view it as bfloat16).
        labels_dtype: "int64" or "uint8".
        num_threads: CPU threads, None for all cores. The result does not depend on it.

    Returns:
        Image and labels on the device of `image`.

    Raises:
        InputError: An argument has another type, rank, dtype, device or range.

    >>> import numpy as np
    >>> from gpuparse.sampling import identity_params
    >>> image = np.full((1, 3, 64, 64), 100, np.uint8)
    >>> params = identity_params(1)
    >>> params["shift"] = -3.5
    >>> batch = augment(image, image[:, 0], params, class_ids=[[100, 7]])
    >>> batch
    AugmentedBatch(image=(1, 3, 64, 64) float32, labels=(1, 2, 64, 64) int64)
    >>> float(batch.image.max()), batch.labels.sum(axis=(2, 3)).tolist()
    (96.5, [[4096, 0]])
    """
    _check_array("image", image, 4, ("uint8",), image)
    _check_array("mask", mask, 3, ("uint8", "uint16", "uint32"), image)
    num_samples, channels, height, width = image.shape
    if channels != 3 or len(mask) != num_samples:
        raise InputError(
            f"image has shape {tuple(image.shape)} and mask {tuple(mask.shape)}; expected (batch, 3, height, width) "
            "and (batch, rows, columns)."
        )
    spec = _label_spec(class_ids, labels, num_samples)
    num_threads = check_num_threads(num_threads)
    view = view_geometry(mask.shape, 0, recipe)
    planes = array_planes(view, num_samples, (view.width * mask.itemsize, mask.itemsize), mask.itemsize)
    blocks = np.arange(num_samples, dtype=np.int64) * (view.height * view.width * mask.itemsize)
    tables = resampling_tables(((view.padded_height, height), (view.padded_width, width)))
    with kernels.device_of(image):
        return finish_batch(
            kernels.in_words(image, 4),
            kernels.in_words(mask, mask.itemsize).reshape(-1).view(np.uint8),
            blocks,
            planes,
            tables,
            params,
            spec,
            OutputTypes(image_dtype, labels_dtype),
            num_threads=num_threads,
        )


def _check_array(name: str, array: Any, rank: int, dtypes: tuple[str, ...], image: Any) -> None:
    if not (isinstance(array, np.ndarray) or kernels.is_device_array(array)):
        raise InputError(f"{name} is {type(array).__name__}; expected a numpy or CuPy array.")
    kernels.check_place(name, array, image)
    if array.ndim != rank or 0 in array.shape[1:]:
        raise InputError(f"{name} has shape {tuple(array.shape)}; expected {rank} axes, none of them empty.")
    if str(array.dtype) not in dtypes:
        raise InputError(f"{name} has dtype {array.dtype}; expected {' or '.join(dtypes)}.")


def _label_spec(class_ids: npt.ArrayLike | None, labels: str, num_samples: int) -> LabelSpec:
    check_choice("labels", labels, _MODES)
    modes = np.full(num_samples, _MODES[labels], np.int32)
    if labels == "classes":
        return LabelSpec(np.zeros((num_samples, 1), np.int32), modes, stacked=False)
    ids = whole_numbers("class_ids", [] if class_ids is None else class_ids, "(batch, num_prompts) class ids")
    if ids.ndim != 2 or len(ids) != num_samples or ids.shape[1] == 0:
        raise InputError(f"class_ids has shape {ids.shape}; expected (batch, num_prompts) with batch {num_samples}.")
    if num_samples and (ids.min() < 0 or ids.max() >= 2**31):
        raise InputError(f"class_ids has values {ids.min()}..{ids.max()}; expected 0 to 2^31 - 1.")
    if labels == "foreground":
        return LabelSpec(np.ascontiguousarray(ids[:, :1], np.int32), modes, stacked=False)
    return LabelSpec(np.ascontiguousarray(ids, np.int32), modes, stacked=True)


def _check_params(params: npt.NDArray[Any], num_samples: int, height: int, width: int) -> npt.NDArray[Any]:
    if not isinstance(params, np.ndarray) or params.dtype != PARAMS_DTYPE or params.shape != (num_samples,):
        got = f"{params.shape} {params.dtype}" if isinstance(params, np.ndarray) else type(params).__name__
        raise InputError(f"params is {got}; expected ({num_samples},) of PARAMS_DTYPE, as sample_params returns it.")
    for name, low, high in (("rotate", 0, 3), ("flip", 0, 3), ("crop", 0, 1), ("noise_mode", 0, 3)):
        if num_samples and not (low <= params[name].min() and params[name].max() <= high):
            raise InputError(f"params[{name!r}] has values {np.unique(params[name])}; expected {low} to {high}.")
    if height != width and bool(np.any(params["rotate"] % 2)):
        raise InputError(f"params['rotate'] asks for a quarter turn of {height}x{width} slices; expected square ones.")
    # A sum that is cut to 8 bits goes through an integer, which infinity has none of, nor has 2^31.
    cut = params["noise_mode"] == 3
    for name, used, limited in (("noise_std", params["noise_mode"] > 0, slice(None)), ("shift", slice(None), cut)):
        values = params[name][used]
        if not np.isfinite(values).all():
            raise InputError(f"params[{name!r}] holds NaN or infinity; expected grey levels.")
        most = np.abs(values[limited]).max(initial=0)
        if most > _MOST_GREY_LEVELS:
            raise InputError(f"params[{name!r}] has values up to {most:g}; expected grey levels, 1e8 at most.")
    crops = params[params["crop"] == 1]
    for name in ("crop_top", "crop_left"):
        if len(crops) and np.abs(crops[name].astype(np.int64)).max() > 4 * max(height, width):
            raise InputError(f"params[{name!r}] is {crops[name].min()}..{crops[name].max()}; expected within 4 sides.")
    for name in ("crop_height", "crop_width"):
        if len(crops) and not (crops[name].min() >= 1 and crops[name].max() <= 4 * max(height, width)):
            raise InputError(f"params[{name!r}] is {crops[name].min()}..{crops[name].max()}; expected 1 to 4 sides.")
    return np.ascontiguousarray(params)


def _crop_tables(
    params: npt.NDArray[Any], height: int, width: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.float32], npt.NDArray[np.int32]]:
    """Per sample the numbers of its row and column table; and the tables: linear index, linear weight, nearest."""
    numbers = np.zeros((len(params), 2), np.int32)
    wanted: dict[tuple[int, int], int] = {}
    cropped = np.flatnonzero(params["crop"])
    heights, widths = (params[name][cropped].tolist() for name in ("crop_height", "crop_width"))
    if len(cropped):
        numbers[cropped] = [
            [wanted.setdefault(lengths, len(wanted)) for lengths in ((rows, height), (columns, width))]
            for rows, columns in zip(heights, widths, strict=True)
        ]
    longest = max(height, width)
    if not wanted:  # there is a table in any case, that no sample refers to
        wanted[longest, longest] = 0
    indices, weights = zip(*[linear_table(*lengths) for lengths in wanted], strict=True)
    nearest_rows = [nearest_indices(*lengths) for lengths in wanted]
    index, weight, nearest = (stack_tables(rows, longest) for rows in (indices, weights, nearest_rows))
    return numbers, index, weight, nearest


@dataclass(frozen=True, eq=False)
class FinishTables:
    """What the last kernel needs besides pixels, checked; arrays of the host, or of a GPU once they lie there.

    Attributes:
        params: (batch,) PARAMS_DTYPE, or (batch, 72) uint8 on a GPU.
        crop_numbers: (batch, 2) int32, each sample's row and column table.
        linear_index: (num_tables, longest) int32.
        linear_weight: (num_tables, longest) float32.
        crop_nearest: (num_tables, longest) int32.
        class_ids: (batch, num_prompts) int32.
        modes: (batch,) int32.
    """

    params: Any
    crop_numbers: Any
    linear_index: Any
    linear_weight: Any
    crop_nearest: Any
    class_ids: Any
    modes: Any


def prepare_finish(
    params: npt.NDArray[Any],
    spec: LabelSpec,
    label_planes: npt.NDArray[Any],
    size: tuple[int, int],
    types: OutputTypes,
) -> FinishTables:
    """Makes the tables that go with a batch's parameters.

    Args:
        params: (batch,) PARAMS_DTYPE, drawn here or checked.
        spec: What labels to make.
        label_planes: (batch,) PLANE_DTYPE.
        size: Rows and columns of an encoded slice.
        types: Element types of the outputs.

    Raises:
        InputError: uint8 labels cannot hold the stored ids.
    """
    if types.labels == "uint8":
        modes = spec.modes
        raw_ids = ((modes == _MODES["instances"]) | (modes == _MODES["classes"])) & (params["wrap_ids"] == 0)
        too_wide = label_planes["itemsize"][raw_ids].max(initial=1) > 1
        if too_wide or (modes == _MODES["foreground"]).any() & (spec.class_ids > 255).any():
            raise InputError("labels_dtype is 'uint8', but the ids of this batch need 16 or 32 bits. Use 'int64'.")
    return FinishTables(params, *_crop_tables(params, *size), spec.class_ids, spec.modes)


def device_kernel(height: int, width: int) -> str:
    """The kernel that a GPU runs on slices of a size, which is the name of its file: both make the same bits."""
    return "augment_tiles" if height % TILE_SIDE == 0 and width % TILE_SIDE == 0 else "augment"


def launch_finish(
    images: Any,
    arena: Any,
    blocks: Any,
    label_planes: Any,
    tables: ResamplingTables,
    finish: FinishTables,
    types: OutputTypes,
    out: AugmentedBatch,
    num_threads: int | None = None,
) -> None:
    """Runs the last kernel on arrays that are checked and in place; the arguments are those of `finish_batch`."""
    num_samples, _, height, width = images.shape
    codes = (_IMAGE_TYPES[types.image][0], _LABEL_TYPES[types.labels][0])
    sizes = (finish.class_ids.shape[1], height, width, *codes)
    crop_arrays = (finish.params, finish.crop_numbers, finish.linear_index, finish.linear_weight, finish.crop_nearest)
    crop_length = finish.linear_index.shape[1]
    if kernels.is_device_array(images):
        with images.device:
            arguments = (
                images, arena, *map(kernels.on_device, (blocks, label_planes, tables.nearest)), np.int32(tables.length),
                *map(kernels.on_device, crop_arrays), np.int32(crop_length),
                *map(kernels.on_device, (finish.class_ids, finish.modes)), *(np.int32(n) for n in sizes),
                out.image, out.labels,
            )  # fmt: skip
            name = device_kernel(height, width)
            quads = -(-height * width // 4)
            kernels.launch_on_device(f"{name}.cu", name, num_samples * quads, arguments)
        return
    p = kernels.pointer
    kernels.host_library().gpuparse_augment(
        ctypes.c_int64(num_samples),
        ctypes.c_int32(num_threads or num_usable_cpus()),
        *map(p, (images, arena, blocks, label_planes, tables.nearest)),
        ctypes.c_int32(tables.length),
        *map(p, crop_arrays),
        ctypes.c_int32(crop_length),
        p(finish.class_ids),
        p(finish.modes),
        *(ctypes.c_int32(n) for n in sizes),
        p(out.image),
        p(out.labels),
    )


def finish_batch(
    images: Any,
    arena: Any,
    blocks: npt.NDArray[np.int64],
    label_planes: npt.NDArray[Any],
    tables: ResamplingTables,
    params: npt.NDArray[Any],
    spec: LabelSpec,
    types: OutputTypes,
    *,
    out: AugmentedBatch | None = None,
    num_threads: int | None = None,
) -> AugmentedBatch:
    """Makes the tensors of a batch from encoded images and the native label planes.

    Args:
        images: (batch, 3, height, width) uint8, C-contiguous; numpy, or CuPy to run on its GPU.
        arena: (n,) uint8 on the same device, decoded chunks.
        blocks: (num_blocks,) int64 byte offsets in the arena, -1 for missing chunks.
        label_planes: (batch,) PLANE_DTYPE.
        tables: The resampling tables that the planes refer to.
        params: (batch,) PARAMS_DTYPE.
        spec: What labels to make.
        types: Element types of the outputs.
        out: Arrays to write into, of the outputs' shapes and types; None allocates.
        num_threads: CPU threads, None for all cores.

    Raises:
        InputError: The table does not fit the batch, or uint8 labels cannot hold the stored ids.
    """
    num_samples, _, height, width = images.shape
    if len(label_planes) != num_samples:
        raise InputError(f"there are {num_samples} images and {len(label_planes)} label planes; expected one for each.")
    params = _check_params(params, num_samples, height, width)
    finish = prepare_finish(params, spec, label_planes, (height, width), types)
    if out is None:
        labels_shape = (num_samples, *spec.class_ids.shape[1:] * spec.stacked, height, width)
        image_type, label_type = types.arrays
        if kernels.is_device_array(images):
            import cupy

            with images.device:
                out = AugmentedBatch(cupy.empty(images.shape, image_type), cupy.empty(labels_shape, label_type))
        else:
            out = AugmentedBatch(np.empty(images.shape, image_type), np.empty(labels_shape, label_type))
    launch_finish(images, arena, blocks, label_planes, tables, finish, types, out, num_threads)
    return out
