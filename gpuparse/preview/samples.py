"""Samples made by the code that makes training's: once as they are encoded, once as augmentation leaves them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuparse.arguments import check_flag, whole_number
from gpuparse.augment import LabelSpec, OutputTypes
from gpuparse.dataset import SliceDataset
from gpuparse.errors import InputError
from gpuparse.gather import SliceKey
from gpuparse.pack import pack
from gpuparse.places import Place
from gpuparse.plan import check_epoch, check_seed
from gpuparse.preview.words import describe_params
from gpuparse.prompts import PROMPT_SEPARATOR
from gpuparse.read import ChunkReader
from gpuparse.remote import RemoteOptions
from gpuparse.render import render_on_host
from gpuparse.sampling import Augmentation, identity_params
from gpuparse.views import Recipe, check_recipe, check_size, view_geometry

__all__ = ["DrawOptions", "Picture", "Sample", "make_samples", "open_dataset"]

_ID_MAP = 2  # the mode of LabelSpec that leaves ids as they are


@dataclass(frozen=True)
class DrawOptions:
    """How samples are drawn.

    Attributes:
        augment: Show each sample augmented too.
        recipe: "corrected" or "reference".
        seed: What training's `SliceDataset` is given.
        epoch: The epoch to draw for.
        num_prompts: Draw so many prompts, as training does; None shows every class that is in the slice.
        size: Rows and columns.

    Raises:
        InputError: A value is of another type or out of range.
    """

    augment: bool = False
    recipe: Recipe = "corrected"
    seed: int = 0
    epoch: int = 0
    num_prompts: int | None = None
    size: tuple[int, int] = (512, 512)

    def __post_init__(self) -> None:
        check_flag("augment", self.augment)
        check_recipe(self.recipe)
        check_seed(self.seed)
        check_epoch(self.epoch)
        if self.num_prompts is not None:
            whole_number("num_prompts", self.num_prompts, 1)
        check_size(self.size)


@dataclass(frozen=True, eq=False)
class Picture:
    """One image with its labels, as small as they can be shown.

    Attributes:
        pixels: (rows, columns, 3) uint8: the slice, the one before, the one after; rounded and cut to 0..255, which
            augmentation may leave.
        labels: (rows, columns) unsigned, ids as they are.
    """

    pixels: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.unsignedinteger[Any]]

    @staticmethod
    def of(image: npt.NDArray[np.float32], labels: npt.NDArray[np.int64]) -> Picture:
        """The picture of a training sample: (3, rows, columns) and (rows, columns)."""
        whole = np.rint(np.clip(image, 0, 255)).astype(np.uint8)
        narrow = np.min_scalar_type(int(labels.max(initial=0)))
        return Picture(np.ascontiguousarray(whole.transpose(1, 2, 0)), labels.astype(narrow))


@dataclass(frozen=True, eq=False)
class Sample:
    """One slice with all that was drawn for it.

    Attributes:
        dataset: The dataset.
        key: Which slice of which store.
        split: Its part of the store.
        native: Rows and columns of the slice before it was padded and resized.
        before: As encoded.
        after: As augmented; None where it was not asked for.
        params: Its row of the parameter table, PARAMS_DTYPE.
        prompts: Class id and prompt, in order; a class may come more than once.
        is_instance: Whether labels are ids of instances, all of the one class.
    """

    dataset: str
    key: SliceKey
    split: str
    native: tuple[int, int]
    before: Picture
    after: Picture | None
    params: Any
    prompts: tuple[tuple[int, str], ...]
    is_instance: bool

    @property
    def case(self) -> str:
        """The case's name."""
        return self.key.store.case_columns.names[self.key.case]

    @property
    def num_slices(self) -> int:
        """Slices of the case along the sample's axis."""
        return int(self.key.store.case_columns.shape[self.key.case, self.key.axis])

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Voxel size along z, y, x."""
        return tuple(self.key.store.case_columns.spacing_mm[self.key.case].tolist())

    @property
    def words(self) -> tuple[str, ...]:
        """The drawn parameters in words."""
        rows, columns = self.before.labels.shape
        return describe_params(self.params, (rows, columns))

    def to_json(self) -> dict[str, Any]:
        """Everything but the pixels, as JSON values."""
        return {
            "dataset": self.dataset,
            "case": self.case,
            "axis": self.key.axis,
            "position": self.key.position,
            "split": self.split,
            "native_shape": list(self.native),
            "prompts": [{"class_id": class_id, "text": text} for class_id, text in self.prompts],
            "augmented": self.after is not None,
            "parameters": {name: self.params[name].item() for name in self.params.dtype.names},
            "words": list(self.words),
        }


def open_dataset(
    place: Place, split: str, options: DrawOptions, *, name: str | None = None, remote: RemoteOptions | None = None
) -> SliceDataset:
    """The dataset that training would read a store by.

    Args:
        place: The store.
        split: `train` or `val`.
        options: How samples are drawn.
        name: What training calls it, on which depends what is drawn; None takes the store's name.
        remote: How a URL is read; None takes the defaults.

    Raises:
        InputError: Augmentation is asked for where training draws none, or the split is empty.
    """
    if options.augment and split == "val" and options.recipe == "corrected":
        raise InputError("augment is on for split 'val'; validation is not augmented. Leave it out, or use 'train'.")
    return SliceDataset(
        str(place),
        split,
        num_prompts=4 if options.num_prompts is None else options.num_prompts,
        all_class_masks=options.num_prompts is None,
        transforms=Augmentation() if options.augment else None,
        img_size=options.size,
        name=name,
        recipe=options.recipe,
        seed=options.seed,
        remote=remote,
    )


def make_samples(dataset: SliceDataset, rows: npt.NDArray[np.int64], options: DrawOptions) -> list[Sample]:
    """Makes some samples.

    Args:
        dataset: What `open_dataset` made of the same options.
        rows: Rows of its store's slice index, of its split.
        options: How they are drawn.

    Raises:
        SliceReadError: A slice cannot be read.
    """
    reader = ChunkReader()
    indices = np.searchsorted(dataset.rows, rows).tolist()
    return [_sample(dataset, reader, index, row, options) for index, row in zip(indices, rows.tolist(), strict=True)]


def _sample(dataset: SliceDataset, reader: ChunkReader, index: int, row: int, options: DrawOptions) -> Sample:
    drawn = dataset.describe(np.array([index]), options.epoch)
    key, store = drawn.keys[0], dataset.store
    prompts = list(zip(map(int, drawn.class_ids[0].split("&")), drawn.texts[0].split(PROMPT_SEPARATOR), strict=True))
    if options.num_prompts is None:
        present = set(store.slices.classes_in(row).tolist())
        prompts = [(class_id, text) for class_id, text in prompts if class_id in present]
    # Both pictures in one go, so that their chunks are read once.
    params = drawn.params if not options.augment else np.concatenate([identity_params(1), drawn.params])
    num_pictures = len(params)
    labels = LabelSpec(np.ones((num_pictures, 1), np.int32), np.full(num_pictures, _ID_MAP, np.int32), stacked=False)
    packed = pack(reader, [key] * num_pictures, params, labels, options.size, OutputTypes())
    made = render_on_host(packed, options.size, OutputTypes())
    pictures = [Picture.of(made.image[i], made.labels[i]) for i in range(num_pictures)]
    view = view_geometry(store.case_columns.shape[key.case].tolist(), key.axis, options.recipe)
    return Sample(
        dataset=dataset.name,
        key=key,
        split=dataset.split,
        native=(view.height, view.width),
        before=pictures[0],
        after=pictures[1] if options.augment else None,
        params=drawn.params[0],
        prompts=tuple(prompts),
        is_instance=bool(store.prompts.instance_label),
    )
