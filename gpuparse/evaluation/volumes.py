"""VolumeDataset: the drop-in for BiomedParse's `BiomedParseDataset3D`, over stores or npz folders."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from gpuparse.arguments import check_flag, check_num_threads, whole_number
from gpuparse.device import choose_device
from gpuparse.errors import InputError
from gpuparse.evaluation.case import EvaluationCase
from gpuparse.evaluation.cases import find_cases
from gpuparse.evaluation.entries import PromptSource
from gpuparse.evaluation.prepare import PreparedVolume
from gpuparse.prompts import PROMPT_SEPARATOR
from gpuparse.remote import RemoteOptions
from gpuparse.views import check_size

__all__ = ["VolumeDataset"]


class VolumeDataset(Dataset[dict[str, Any]]):
    """Whole volumes for evaluation, as BiomedParse's evaluator takes them.

    An item is the reference's dict: `image` uint8 (num_slices, size, size), prepared as its `process_input` does it;
    `labels` (z, y, x) at native size and in the file's axis order, uint8, or int32 or int64 where ids need it;
    `text`, one prompt for each class in the order of ids, joined by `[SEP]`; `class_ids`, joined by `&`; `mask_file`;
    `instance_label` int; `axis` int; `pad_width` int64 (3, 2); `padded_size` int. A DataLoader with batch size 1, the
    one that the evaluator works with, puts a batch axis before each.

    It differs from the reference in this: cases come by name; the prompt is each class's first, so that a result can
    be had again; prompts come from a JSON file and never from a pickle; a file that cannot be read is an error and no
    empty item; instance ids stay.

    Args:
        root_dir: A test set, see `gpuparse.evaluation.find_cases`: a store, a dataset's folder, the images' folder,
            or a store's URL.
        img_size: Rows and columns of a prepared slice, which must be equal.
        interpolate_mask_size: Not used, as in the reference.
        name: The test set's name; None takes the dataset folder's.
        split: Which of the dataset's splits; None takes `test`, or of a store named itself what it was made from.
        prompts: Where prompts come from: a JSON file, its content, or None for the usual places.
        binarize: Instance labels become one class, as in the reference, which forgets the ids.
        device: Where images are prepared and returned: "cpu", "cuda", "cuda:N", or None for a GPU where there is one.
            Labels stay on the CPU. A DataLoader
            over volumes on a GPU must have no workers.
        remote: How a URL is read; None takes the defaults.
        num_threads: CPU threads per volume; None for all cores, or one in a DataLoader's worker.

    Raises:
        InputError: There is no such test set, or an argument is out of range.
        DeviceError: There is no such CUDA device.
        MissingDependencyError: A package that the GPU needs is missing.
        StoreFormatError: The store cannot be read.
        StorageError: Remote storage fails.
    """

    def __init__(
        self,
        root_dir: str | os.PathLike[str],
        img_size: Sequence[int] = (512, 512),
        interpolate_mask_size: Sequence[int] = (512, 512),
        name: str | None = None,
        *,
        split: str | None = None,
        prompts: PromptSource = None,
        binarize: bool = False,
        device: str | torch.device | None = "cpu",
        num_threads: int | None = None,
        remote: RemoteOptions | None = None,
    ) -> None:
        self.binarize = check_flag("binarize", binarize)
        self.num_threads = check_num_threads(num_threads)
        rows, columns = check_size(img_size, "img_size")
        if rows != columns:
            raise InputError(f"img_size is {tuple(img_size)}; expected equal rows and columns, slices become squares.")
        found = find_cases(root_dir, split=split, name=name, prompts=prompts, remote=remote)
        self.root_dir = os.fspath(root_dir)
        self.name = found.name
        self.split = found.split
        self.img_size = (rows, columns)
        self.device = str(choose_device(device))
        self.cases: tuple[EvaluationCase, ...] = found.cases

    def __len__(self) -> int:
        return len(self.cases)

    def __repr__(self) -> str:
        return (
            f"VolumeDataset({self.name!r}, {len(self)} cases, {self.img_size[0]}x{self.img_size[1]}, "
            f"device={self.device!r})"
        )

    def volume(self, index: int) -> PreparedVolume:
        """One case's image, prepared when asked for: whole, or in batches of slices with bounded memory."""
        # Workers of a DataLoader share the cores: one thread each, as torch has it there.
        num_threads = 1 if self.num_threads is None and get_worker_info() is not None else self.num_threads
        return PreparedVolume(self._case(index).image(), self.img_size[0], self.device, num_threads)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self.device != "cpu" and get_worker_info() is not None:
            raise InputError(
                f"{self!r} prepares on a GPU, which a DataLoader's worker cannot share. Use num_workers=0, or "
                "device='cpu'."
            )
        case, volume = self._case(index), self.volume(index)
        labels = case.labels()
        if labels.shape != volume.source.shape:
            raise InputError(
                f"{case.mask_file}: labels have shape {labels.shape}, the image {volume.source.shape}; they must be "
                "equal. Resample the mask onto the image."
            )
        class_ids = sorted(case.prompts.class_ids)
        if case.prompts.instance_label and self.binarize:
            labels = np.where(labels > 0, class_ids[0], 0).astype(np.min_scalar_type(class_ids[0]))
        geometry = volume.geometry
        return {
            "image": volume.image(),
            "labels": torch.from_numpy(_signed(labels)),
            "text": PROMPT_SEPARATOR.join(case.prompts.classes[i][0] for i in class_ids),
            "class_ids": "&".join(map(str, class_ids)),
            "mask_file": case.mask_file,
            "instance_label": case.prompts.instance_label,
            "axis": geometry.axis,
            "pad_width": torch.tensor(geometry.pad_width, dtype=torch.int64),
            "padded_size": geometry.padded_size,
        }

    def _case(self, index: int) -> EvaluationCase:
        index = whole_number("index", index, None)
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {self!r}.")
        return self.cases[index]


def _signed(labels: np.ndarray[Any, np.dtype[Any]]) -> np.ndarray[Any, np.dtype[Any]]:
    """Torch computes with uint8, but hardly with wider unsigned types."""
    wide = {1: np.uint8, 2: np.int32, 4: np.int64}
    array = labels.astype(wide[labels.dtype.itemsize], copy=False)
    return array if array.flags.writeable else array.copy()
