"""SliceDataset: the drop-in for BiomedParse's `BiomedParseDataset`, over a store instead of PNG files."""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import logging
import operator
import os
import warnings
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from gpuparse.arguments import check_flag, whole_number
from gpuparse.augment import LabelSpec, OutputTypes
from gpuparse.errors import InputError, StoreFormatError
from gpuparse.gather import SliceKey
from gpuparse.pack import pack
from gpuparse.places import has_folder, open_place
from gpuparse.plan import check_epoch, check_seed, random_keys
from gpuparse.prompts import PROMPT_SEPARATOR
from gpuparse.read import ChunkReader
from gpuparse.remote import RemoteOptions
from gpuparse.render import Samples, render_on_host
from gpuparse.sampling import (
    Augmentation,
    check_fraction,
    check_turns,
    draw_among,
    draw_prompts,
    names_a_side,
    params_from_keys,
    paraphrases,
    redraw_foreground,
    words_for_training,
)
from gpuparse.source import ways_to_a_store
from gpuparse.store import Store, read_store, split_code
from gpuparse.views import Recipe, check_recipe, check_size, view_suffix

__all__ = ["SliceDataset"]

_LOG = logging.getLogger("gpuparse")
_DEFAULT_TRANSFORMS = Augmentation()
_NO_SHARED_MEMORY = (errno.EROFS, errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOSYS)  # for anyone in this place


class SliceDataset(Dataset[dict[str, Any]]):
    """Every trainable slice of a store as a BiomedParse training sample.

    An item is the reference's dict: `image` float32 (3, height, width), 0..255 before augmentation, channels slice,
    slice before, slice after; `labels` int64 (num_prompts, height, width), or (height, width) with
    `all_class_masks`; `text`, the prompts joined by `[SEP]`; `class_ids`, joined by `&`; `mask_file`;
    `instance_label` int; `multiclass_label` bool.

    What is drawn for an item depends on seed, epoch, dataset name and slice alone. Call `set_epoch` before each epoch
    when a plain torch DataLoader is used, else every epoch draws the same; `gpuparse.DataLoader` does it itself.

    With `split="val"` and recipe "corrected" items are fixed: no augmentation, and one prompt for each class of the
    dataset in the order of its prompts (one in all for instance datasets), each its first paraphrase.

    Args:
        root_dir: A dataset's folder, holding `<split>.zarr` or a `train.zarr` with a validation part, or a store; or
            the URL of either.
        split: `train` or `val`, whole volumes each, as conversion stored it.
        num_prompts: Prompts per sample.
        all_class_masks: One map of all classes, with one prompt for each, instead of a mask per prompt.
        transforms: What is drawn and applied; None switches augmentation off.
        img_size: Rows and columns of a sample.
        name: The dataset's name; None takes the folder's, or the one that a store named by `root_dir` was converted
            under.
        views: Slice axes to use: "auto" takes all that conversion chose, or a selection such as (0,).
        recipe: "corrected", or "reference" for the reference's behaviour bug for bug.
        seed: 0 .. 2^64 - 1.
        present_fraction: Share of prompts drawn from the classes present in the slice; 0 draws from all classes.
        foreground_fraction: Share of samples redrawn from the slices that show any class; 0 takes slices as they come.
            `gpuparse.DataLoader` redraws among the slices that it was given, by a `Subset` for example, and with
            `shuffle_block` among those of the block. An item taken from the dataset itself cannot know: it is redrawn
            among all slices, and a warning says so, once.
        remote: How a URL is read, with how many attempts and which cache on disk; None takes the defaults.

    Raises:
        StoreFormatError: There is no readable store.
        StorageError: Remote storage does not answer or refuses.
        InputError: An argument is out of range.
        MissingDependencyError: It is a URL, and obstore is not installed.
        ChunkCorruptError: While taking an item: its slice cannot be read.
        IndexError: While taking an item: there is none of that number.
    """

    def __init__(
        self,
        root_dir: str | os.PathLike[str],
        split: str = "train",
        num_prompts: int = 4,
        all_class_masks: bool = False,
        transforms: Augmentation | None = _DEFAULT_TRANSFORMS,
        img_size: Sequence[int] = (512, 512),
        name: str | None = None,
        views: Literal["auto"] | Sequence[int] = "auto",
        recipe: Recipe = "corrected",
        seed: int = 0,
        *,
        present_fraction: float = 0.0,
        foreground_fraction: float = 0.0,
        remote: RemoteOptions | None = None,
    ) -> None:
        if not isinstance(root_dir, str | os.PathLike) or not os.fspath(root_dir):
            raise InputError(f"root_dir is {root_dir!r}; expected a dataset's folder or a store.")
        split_code(split)
        if name is not None and not isinstance(name, str):
            raise InputError(f"name is {name!r}; expected a string, or None for the folder's name.")
        if transforms is not None and not isinstance(transforms, Augmentation):
            raise InputError(
                f"transforms is {type(transforms).__name__}; expected gpuparse.Augmentation(...) or None. "
                "Augmentation runs in gpuparse's own kernel; apply other transforms to the batches."
            )
        self.root_dir = os.fspath(root_dir).rstrip("/") or "/"  # shells complete folders with a slash
        self.split = split
        self.num_prompts = whole_number("num_prompts", num_prompts, 1)
        self.all_class_masks = check_flag("all_class_masks", all_class_masks)
        self.fixed = split == "val" and recipe == "corrected"
        self.transforms = None if self.fixed else transforms
        self.img_size = check_size(img_size, "img_size")
        if self.transforms is not None:
            check_turns(self.transforms, self.img_size)
        self.recipe = check_recipe(recipe)
        self.seed = check_seed(seed)
        self.present_fraction = check_fraction("present_fraction", present_fraction)
        self.foreground_fraction = check_fraction("foreground_fraction", foreground_fraction)
        self._mask_dir = os.path.join(self.root_dir, f"{split}_mask", "")
        self.store = _open_split(self.root_dir, split, remote)
        self.name = name or (
            self.store.name if self.root_dir.endswith(".zarr") else Path(os.path.abspath(self.root_dir)).name
        )
        self._rows = self._select(views)
        self.allow_mirror = self._decide_mirror()
        # Shared memory, so that persistent workers of a torch DataLoader see set_epoch.
        self._epoch, self._has_warned = _shared(torch.zeros(2, dtype=torch.int64)).split(1)  # type: ignore[no-untyped-call]
        self._reader = ChunkReader()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for shared in (self._epoch, self._has_warned):  # a copy's, too; what came from another process is already
            _shared(shared)

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        num_cases = len(np.unique(self.store.slices.case[self._rows]))
        return (
            f"SliceDataset({self.name!r}, split={self.split!r}, {len(self)} slices of {num_cases} cases, "
            f"{self.num_prompts} prompts, recipe={self.recipe!r})"
        )

    @property
    def epoch(self) -> int:
        """The epoch that items are drawn for."""
        return int(self._epoch[0])

    @property
    def case_numbers(self) -> npt.NDArray[np.int32]:
        """The cases of the store that this dataset's slices are from, ascending."""
        cases: npt.NDArray[np.int32] = np.unique(self.store.slices.case[self._rows])
        return cases

    @property
    def rows(self) -> npt.NDArray[np.int64]:
        """(len,) the row of the store's slice index that each item is, ascending."""
        return self._rows

    def set_epoch(self, epoch: int) -> None:
        """Makes items draw the prompts and the augmentation of another epoch.

        Raises:
            InputError: `epoch` is no whole number from 0 to 2^32 - 1.
        """
        self._epoch[0] = check_epoch(epoch)

    def __getitem__(self, index: int) -> dict[str, Any]:
        length, index = len(self), whole_number("index", index, None)
        if not -length <= index < length:
            raise IndexError(f"index {index} is out of range for {self!r}.")
        if self.redraws and not self._has_warned:
            self._has_warned[0] = 1
            warnings.warn(
                f"dataset {self.name!r}: items taken one by one are redrawn (foreground_fraction) from all of its "
                "slices. A torch Subset around it, or a sampler, keeps none of them out, not even those set aside for "
                "validation. gpuparse.DataLoader redraws within a Subset.",
                stacklevel=2,
            )
        samples = self.describe(np.array([index % length]), self.epoch)
        packed = pack(self._reader, samples.keys, samples.params, samples.labels, self.img_size, OutputTypes())
        rendered = render_on_host(packed, self.img_size, OutputTypes())
        return {
            "image": torch.from_numpy(rendered.image[0]),
            "labels": torch.from_numpy(rendered.labels[0]),
            "text": samples.texts[0],
            "class_ids": samples.class_ids[0],
            "mask_file": samples.mask_files[0],
            "instance_label": samples.instance_labels[0],
            "multiclass_label": samples.multiclass_labels[0],
        }

    def describe(
        self,
        indices: npt.NDArray[np.int64],
        epoch: npt.ArrayLike,
        redraw: Callable[[npt.NDArray[np.uint32]], npt.NDArray[np.int64]] | None = None,
    ) -> Samples:
        """Draws some items without reading a pixel.

        Args:
            indices: (n,) from 0 to len - 1.
            epoch: The epoch to draw for, one for all or one each.
            redraw: Of a random word for each item, which slice that shows a class `foreground_fraction` may put in its
                place; None draws from all of them.
        """
        table, prompts = self.store.slices, self.store.prompts
        # The row of the store, not of this selection: choosing other views changes no sample.
        sample_ids = (np.uint64(zlib.crc32(self.name.encode())) << np.uint64(32)) | self._rows[indices].astype(
            np.uint64
        )
        random = random_keys(self.seed, epoch, sample_ids)
        random.prepare(words_for_training(self.num_prompts))
        if self.redraws:
            everywhere = np.array([[0, len(self)]])
            redraw = redraw or (lambda words: draw_among(words, self._foreground, everywhere, indices))
            indices = redraw_foreground(random, indices, redraw, self.foreground_fraction)
        rows = self._rows[indices]
        params = params_from_keys(
            self.transforms,
            random,
            size=self.img_size,
            recipe=self.recipe,
            allow_mirror=self.allow_mirror,
            zeroed=table.zeroed[rows] != 0,
        )
        if self.fixed and not self.all_class_masks:
            classes = prompts.class_ids[:1] if prompts.instance_label else prompts.class_ids
            class_ids = np.tile(np.array(classes), (len(rows), 1))
            texts = [[prompts.classes[i][0] for i in classes]] * len(rows)
            label_ids, mode = class_ids, 1 if prompts.instance_label else 0
        elif self.all_class_masks:
            everything = np.tile(np.sort(np.array(prompts.class_ids)), (len(rows), 1))
            class_ids, texts = everything, paraphrases(prompts, random, everything)
            if self.fixed:
                texts = [[prompts.classes[i][0] for i in sorted(prompts.class_ids)]] * len(rows)
            label_ids, mode = everything[:, :1], 3 if prompts.instance_label else 2
        else:
            present = [table.classes_in(row).tolist() for row in rows] if self.present_fraction else None
            class_ids, texts = draw_prompts(
                prompts, random, self.num_prompts, present=present, present_fraction=self.present_fraction
            )
            label_ids, mode = class_ids, 1 if prompts.instance_label else 0
        places = (table.case[rows].tolist(), table.axis[rows].tolist(), table.position[rows].tolist())
        keys = tuple(SliceKey(self.store, *place, self.recipe) for place in zip(*places, strict=True))
        return Samples(
            keys=keys,
            params=params,
            labels=LabelSpec(
                np.ascontiguousarray(label_ids, np.int32),
                np.full(len(rows), mode, np.int32),
                stacked=not self.all_class_masks,
            ),
            texts=tuple(PROMPT_SEPARATOR.join(row) for row in texts),
            class_ids=tuple("&".join(map(str, row)) for row in class_ids.tolist()),
            mask_files=tuple(self._mask_file(key) for key in keys),
            instance_labels=(prompts.instance_label,) * len(rows),
            multiclass_labels=(self.all_class_masks,) * len(rows),
        )

    @property
    def redraws(self) -> bool:
        """Whether `foreground_fraction` puts other slices in the place of some."""
        return self.foreground_fraction > 0 and not self.fixed

    @functools.cached_property
    def _foreground(self) -> npt.NDArray[np.int64]:
        """The slices that show a class; needed only to redraw single items."""
        return np.flatnonzero(self.shows_a_class(np.arange(len(self._rows))))

    def shows_a_class(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """(n,) whether there is any class in each item's slice."""
        rows, indptr = self._rows[indices], self.store.slices.class_indptr
        return indptr[rows + 1] > indptr[rows]

    def cases_of(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        """(n,) the number of the case that each item is cut from."""
        return self.store.slices.case[self._rows[indices]]

    def fingerprint(self) -> list[object]:
        """What tells this dataset's list of samples and their random numbers from another's, as JSON values."""
        cases = json.dumps([(case.name, case.shape) for case in self.store.cases])
        return [
            self.name,
            self.split,
            len(self),
            hashlib.sha256(cases.encode() + self._rows.tobytes()).hexdigest()[:16],
            self.seed,
            self.recipe,
        ]

    def _mask_file(self, key: SliceKey) -> str:
        """What the reference calls this slice's mask; no such file exists here."""
        name = f"{key.store.cases[key.case].name}{view_suffix(key.axis)}_{key.position:03d}.png"
        return f"{self._mask_dir}{name}"

    def _select(self, views: Literal["auto"] | Sequence[int]) -> npt.NDArray[np.int64]:
        axes = self.store.slices.axis
        members = self.store.slices.split == split_code(self.split)
        if not members.any() and len(members):
            remedy = "Convert with --val-fraction or --split-file to have a validation part."
            if self.split == "train":
                remedy = "All that it has are in split 'val': pass split='val'."
            raise InputError(f"'{self.store.place}' has no slices in split {self.split!r}. {remedy}")
        if isinstance(views, str):
            if views != "auto":
                raise InputError(f"views is {views!r}; expected 'auto' or axes such as (0,) or (0, 1, 2).")
            return np.flatnonzero(members).astype(np.int64)
        try:
            wanted = sorted({operator.index(view) for view in views})
        except TypeError:
            raise InputError(f"views is {views!r}; expected 'auto' or axes such as (0,) or (0, 1, 2).") from None
        there = sorted({int(axis) for axis in np.unique(axes[members])})
        missing = [view for view in wanted if view not in there]
        if missing or not wanted:
            raise InputError(f"views is {tuple(views)}; '{self.store.place}' has slices along {tuple(there)}.")
        return np.flatnonzero(members & np.isin(axes, wanted)).astype(np.int64)

    def _decide_mirror(self) -> bool:
        transforms = self.transforms
        if transforms is None or not transforms.flip or transforms.mirror != "auto":
            return True if transforms is None else bool(transforms.mirror)
        if self.recipe == "reference":
            return True
        prompt = names_a_side(self.store.prompts)
        if prompt is None:
            _LOG.info("%s: mirroring is on, no prompt names a side; mirror=False switches it off.", self.name)
        else:
            _LOG.info(
                "%s: mirroring is off, the prompt %r names a side; mirror=True switches it on.", self.name, prompt
            )
        return prompt is None


def _shared(numbers: torch.Tensor) -> torch.Tensor:
    """A tensor, moved to shared memory; as it is where there is none, where torch's workers cannot run either."""
    try:
        numbers.share_memory_()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        if not any(os.strerror(number) in str(error) for number in _NO_SHARED_MEMORY):
            raise
    return numbers


def _open_split(root_dir: str, split: str, remote: RemoteOptions | None) -> Store:
    root = open_place(root_dir, remote)
    if root_dir.endswith(".zarr"):
        return read_store(root)
    own, shared = root / f"{split}.zarr", root / "train.zarr"
    place = own if has_folder(own) else shared
    if not has_folder(place):
        if not isinstance(root, Path):
            remedy = "Make one with `gpuparse convert`, or name a .zarr folder."
        elif not root.is_dir():
            remedy = "There is no such folder: name one that is there, a dataset's or a store."
        elif not (inside := sorted(path.parent.name for path in root.glob("*/*.zarr"))):
            remedy = ways_to_a_store(root, root.parent)
        else:
            names = list(dict.fromkeys(inside))
            remedy = f"It holds datasets: name one of them, such as '{root / names[0]}' ({', '.join(names)})."
        raise StoreFormatError(
            f"'{root_dir}' holds no {own.name}{'' if own == shared else ' and no train.zarr'}. {remedy}"
        )
    return read_store(place)
