"""Lightning: a data module of gpuparse loaders, and a callback that logs what the training loader reports.

Lightning shards no loader but torch's, so each rank's loader takes its own part by itself. Before each epoch Lightning
calls `batch_sampler.sampler.set_epoch`. It keeps the training loader's `state_dict` in its checkpoints, but does not
give it back where `fit` had ended, and counts epochs and batches differently then: so the data module keeps the
loader's place, too, and the loader counts for itself until it is at the end of an epoch.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType, SimpleNamespace
from typing import Any, TypeAlias

import torch
from torch.utils.data import Dataset

from gpuparse.arguments import whole_number
from gpuparse.errors import InputError, MissingDependencyError
from gpuparse.evaluation.volumes import VolumeDataset
from gpuparse.loader import DataLoader
from gpuparse.torch_options import check_torch_options, is_torch_option

__all__ = ["GpuparseDataModule", "LoaderReportCallback"]

_LOG = logging.getLogger("gpuparse")

Source: TypeAlias = Dataset[Any] | Callable[[], Dataset[Any]]

# What shapes the order of training and is not handed down to validation and test.
_TRAINING_ONLY = ("shuffle", "drop_last", "weights", "shuffle_block")
# What the data module or Lightning decides.
_TAKEN = ("self", "dataset", "rank", "world_size")


def _import_lightning() -> Any:
    """Lightning under one of its two names, whose classes do not mix: the one this program has imported already."""
    reasons = []
    for name in sorted(("lightning.pytorch", "pytorch_lightning"), key=lambda name: name not in sys.modules):
        try:
            return importlib.import_module(name)
        except ImportError as error:
            reasons.append(f"{name}: {error}")
    raise MissingDependencyError(
        f"gpuparse.integrations.lightning needs Lightning, which cannot be imported ({'; '.join(reasons)}). Install it "
        "with `pip install gpuparse[lightning]`."
    )


_pl = _import_lightning()
_LightningDataModule: Any = _pl.LightningDataModule
_Callback: Any = _pl.Callback


class GpuparseDataModule(_LightningDataModule):
    """The loaders of a run: one for training, any number for validation and test.

    Training shuffles unless told otherwise, follows the trainer's epoch, and is saved in and restored from Lightning's
    checkpoints: a run resumed with `trainer.fit(..., ckpt_path=...)` goes on with the first batch that was not trained
    on. Validation and test make the same samples in the same order every time they run.

    Batches are made where the trainer computes, unless `options` names a device.

    Args:
        train: The training data, as `gpuparse.DataLoader` takes it, or a function without arguments that makes it in
            each process.
        val: The validation data: one such thing, or a sequence of them, which become several loaders.
        test: The test data, likewise. A `gpuparse.VolumeDataset`, here or in `val`, gets a loader of torch's with
            batches of one volume, which `options` do not concern.
        options: Keyword arguments of `gpuparse.DataLoader` for all loaders. `shuffle`, `drop_last`, `weights` and
            `shuffle_block` go to training alone.
        eval_options: Further ones for validation and test; they go before `options`.

    Raises:
        InputError: Options are no mapping, one is not the loader's, or data are neither datasets nor functions.

    Example:
        >>> datamodule = GpuparseDataModule(
        ...     train=lambda: gpuparse.SliceDataset("DATA_DIR/DATASET1"),
        ...     val=lambda: gpuparse.SliceDataset("DATA_DIR/DATASET1", split="val"),
        ...     options={"batch_size": 8, "seed": 1},
        ... )
        >>> trainer.fit(model, datamodule)  # doctest: +SKIP
    """

    def __init__(
        self,
        train: Source | None = None,
        val: Source | Sequence[Source] | None = None,
        test: Source | Sequence[Source] | None = None,
        *,
        options: Mapping[str, Any] | None = None,
        eval_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self._options = _check_options("options", options)
        self._eval_options = _check_options("eval_options", eval_options)
        given = {"train": train, "val": val, "test": test}
        self._sources = {part: _as_list(part, sources) for part, sources in given.items()}
        self._datasets: dict[str, list[Dataset[Any]]] = {}
        self._place = _Place()

    @property
    def options(self) -> Mapping[str, Any]:
        """The options of all loaders; they cannot change."""
        return MappingProxyType(self._options)

    @property
    def eval_options(self) -> Mapping[str, Any]:
        """Further options of the loaders for validation and test; they cannot change."""
        return MappingProxyType(self._eval_options)

    def __repr__(self) -> str:
        data = ", ".join(f"{part}={sources!r}" for part, sources in self._sources.items() if sources)
        return f"GpuparseDataModule({data}, options={self._options!r}, eval_options={self._eval_options!r})"

    __str__ = __repr__  # Lightning's own would run the loaders to see how long they are

    def state_dict(self) -> dict[str, Any]:
        """Where training stands, for a checkpoint; nothing where there is no training."""
        if self._place.resumed is not None:  # nothing was trained on since
            return dict(self._place.resumed)
        return {} if self._place.loader is None else self._place.loader.place_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Makes training go on where `state_dict` was taken."""
        if state_dict and self.trainer is not None and self.trainer.state.fn == "fit":
            self._place.resumed = state_dict

    def train_dataloader(self) -> DataLoader:
        """A new training loader.

        Raises:
            InputError: There is no training data, or an option has a bad value.
        """
        datasets = self._make("train")
        if len(datasets) != 1:
            raise InputError(
                f"GpuparseDataModule has {len(datasets)} training datasets; expected one. Pass train=..., and several "
                "datasets as one torch.utils.data.ConcatDataset."
            )
        options = {"shuffle": True, **self._device(), **self.options}
        if self.trainer is None:
            return DataLoader(datasets[0], **options)
        if self.trainer.train_dataloader is None:  # `fit` begins
            self._place = _Place(resumed=self._place.resumed)
        return _TrainLoader(self.trainer, self._place, datasets[0], options)

    def val_dataloader(self) -> list[Any]:
        """New validation loaders, one for each dataset, in the order of `val`."""
        return self._evaluation_loaders("val")

    def test_dataloader(self) -> list[Any]:
        """New test loaders, one for each dataset, in the order of `test`."""
        return self._evaluation_loaders("test")

    def _evaluation_loaders(self, part: str) -> list[Any]:
        shared = {key: value for key, value in self.options.items() if key not in _TRAINING_ONLY}
        options = {**self._device(), **shared, **self.eval_options}
        return [
            torch.utils.data.DataLoader(dataset, batch_size=1)  # whole volumes, as BiomedParse's evaluation takes them
            if isinstance(dataset, VolumeDataset)
            else _EvaluationLoader(dataset, **options)
            for dataset in self._make(part)
        ]

    def _make(self, part: str) -> list[Dataset[Any]]:
        if part not in self._datasets:
            sources = self._sources[part]
            self._datasets[part] = [source if isinstance(source, Dataset) else source() for source in sources]
        return self._datasets[part]

    def _device(self) -> dict[str, str]:
        """The CPU where the trainer is on the CPU; otherwise the loader's own choice, this process's GPU."""
        on_cpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cpu"
        return {"device": "cpu"} if on_cpu else {}


class LoaderReportCallback(_Callback):
    """Logs the training loader's numbers to the trainer's loggers: `loader.report().metrics()` of rank 0.

    Args:
        log_every_n_steps: Optimizer steps from one log to the next; None takes the trainer's `log_every_n_steps`.

    Raises:
        InputError: `log_every_n_steps` is no whole number of 1 or more.
    """

    def __init__(self, log_every_n_steps: int | None = None) -> None:
        self.log_every_n_steps = (
            None if log_every_n_steps is None else whole_number("log_every_n_steps", log_every_n_steps, 1)
        )
        self._last_step = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuses a training loader that reports nothing.

        Raises:
            InputError: The training loader is not a `gpuparse.DataLoader`.
        """
        if not isinstance(trainer.train_dataloader, DataLoader):
            raise InputError(
                f"LoaderReportCallback: the training loader is {type(trainer.train_dataloader).__name__}; expected "
                "gpuparse.DataLoader. Pass one to trainer.fit, or GpuparseDataModule, or leave the callback out."
            )
        self._last_step = trainer.global_step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Logs where a step is due."""
        step, every = trainer.global_step, self.log_every_n_steps or trainer.log_every_n_steps
        # With accumulated gradients several batches belong to a step.
        if not trainer.is_global_zero or step == self._last_step or step % every:
            return
        self._last_step = step
        metrics = trainer.train_dataloader.report().metrics()
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=step - 1)  # Lightning numbers steps from 0


@dataclass
class _Place:
    """What the training loaders of a run know of it, one after another.

    Attributes:
        num_epochs_ahead: The loader's epoch less Lightning's.
        resumed: What `_TrainLoader.place_dict` said in the checkpoint, until the first batch is asked for.
        is_catching_up: Whether the epoch under way was begun before the checkpoint, or right behind it: Lightning may
            then ask for too few batches of it (a single one where `fit` had ended with an epoch) or too many.
        loader: The one that Lightning trains from; somebody else may ask the module for more.
    """

    num_epochs_ahead: int = 0
    resumed: Mapping[str, Any] | None = None
    is_catching_up: bool = False
    loader: _TrainLoader | None = None


class _TrainLoader(DataLoader):
    """A training loader that stands where its trainer stands.

    Lightning may save in the middle of a step, after an exception or on a signal from SLURM, and counts that step's
    batch as not done. The loader's state must then be the one before that batch, although it was handed out.
    """

    def __init__(self, trainer: Any, place: _Place, dataset: Dataset[Any], options: Mapping[str, Any]) -> None:
        super().__init__(dataset, **options)
        self._trainer = trainer
        self._place = place
        # Of the batch handed out last: the number of batches trained on by then, the state before it and after it.
        self._in_hand: tuple[int, dict[str, Any], dict[str, Any]] | None = None
        if place.loader is not None and place.is_catching_up:  # its epoch may not be at its end
            super().load_state_dict(place.loader.state_dict())

    @property
    def batch_sampler(self) -> Any:
        """Sets the trainer's epoch, whatever number is passed.

        The number passed is one too high after resuming, in a run with `max_steps`, from the end of an epoch.
        """
        return SimpleNamespace(sampler=SimpleNamespace(set_epoch=lambda _epoch: self._follow()))

    def _follow(self) -> None:
        place = self._place
        if place.resumed is not None:  # the first batch decides
            return
        if place.is_catching_up and self._position < self._end:
            super().load_state_dict(super().state_dict())  # the next iteration goes on with this epoch
            place.num_epochs_ahead = self._epoch - self._trainer.current_epoch
            return
        place.is_catching_up = False
        self.set_epoch(self._trainer.current_epoch + place.num_epochs_ahead)

    @property
    def _end(self) -> int:
        """The position at which an epoch ends for Lightning."""
        return self._plan.consumed(min(len(self), self._trainer.num_training_batches))

    @property
    def _progress(self) -> Any:
        """Lightning's count of training batches: `total` since the run began, `current` in this epoch."""
        return self._trainer.fit_loop.epoch_loop.batch_progress

    def state_dict(self) -> dict[str, Any]:
        if self._place.resumed is not None:
            return dict(self._place.resumed["loader"])
        state = super().state_dict()
        if self._in_hand is not None:
            num_trained, before, after = self._in_hand
            if state == after and self._progress.total.processed == num_trained:
                return before
        return state

    def place_dict(self) -> dict[str, Any]:
        """The loader's state; which epoch that is to Lightning, and whether it has no more batches for Lightning."""
        state = self.state_dict()
        return {
            "loader": state,
            "trainer_epoch": state["epoch"] - self._place.num_epochs_ahead,
            "epoch_is_done": state["position"] >= self._end,
        }

    def _resume(self, resumed: Mapping[str, Any]) -> None:
        """Goes where a checkpoint stands, by the loader's own count of epochs."""
        state, trainer_epoch = resumed["loader"], self._trainer.current_epoch
        if resumed["epoch_is_done"] and trainer_epoch != resumed["trainer_epoch"]:
            self.set_epoch(state["epoch"] + 1)
        else:
            self.load_state_dict(state)
        self._place.num_epochs_ahead = self._epoch - trainer_epoch
        # In the epoch that it was saved in, Lightning counts as it did; with `max_steps` it may still ask for a batch
        # behind the last one of `limit_train_batches`.
        self._place.is_catching_up = resumed["epoch_is_done"] or trainer_epoch != resumed["trainer_epoch"]

    def load_state_dict(self, state: Mapping[str, Any], *, strict: bool = True) -> None:
        if self._place.resumed is not None:  # the data module's own goes first
            return
        super().load_state_dict(state, strict=strict)
        num_trained = self._progress.current.processed
        plan = self._plan
        if plan.consumed(num_trained) != state["position"]:
            _LOG.warning(
                "Resuming at sample %d of epoch %d, but Lightning counts %d batches of %d samples there: the "
                "checkpoint is of another batch size or number of processes, or was saved in mid-epoch after fit had "
                "ended. Lightning will end this epoch early or without its validation; the next ones are whole. "
                "Checkpoints from the end of an epoch do not have this problem.",
                state["position"], state["epoch"], num_trained, plan.global_batch_size,
            )  # fmt: skip

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self._trainer.train_dataloader is self:
            self._place.loader = self
            resumed, self._place.resumed = self._place.resumed, None
            if resumed is not None:
                self._resume(resumed)
        with contextlib.closing(super().__iter__()) as batches:  # type: ignore[type-var]
            while not (self._place.is_catching_up and self._position >= self._end):
                before = super().state_dict()
                batch = next(batches, None)
                if batch is None:
                    return
                self._in_hand = self._progress.total.processed, before, super().state_dict()
                yield batch
                del batch  # its buffers serve the next one


class _EvaluationLoader(DataLoader):
    """A loader that runs epoch 0 whenever it is iterated, so that what a metric is taken over never changes."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.set_epoch(0)
        return super().__iter__()


def _as_list(part: str, sources: Source | Sequence[Source] | None) -> list[Source]:
    if sources is None:
        return []
    found: list[Any] = list(sources) if isinstance(sources, Sequence) and not isinstance(sources, str) else [sources]
    for source in found:
        if not isinstance(source, Dataset) and not callable(source):
            raise InputError(
                f"{part} is or has {source!r}; expected a dataset, such as gpuparse.SliceDataset(...), or a function "
                "without arguments that makes one."
            )
    return found


def _check_options(name: str, options: Mapping[str, Any] | None) -> dict[str, Any]:
    """A copy of options that the loader has."""
    if options is not None and not isinstance(options, Mapping):
        raise InputError(f"{name} is {options!r}; expected keyword arguments of gpuparse.DataLoader, in a mapping.")
    parameters = inspect.signature(DataLoader.__init__).parameters.values()
    known = [p.name for p in parameters if p.name not in _TAKEN and p.kind is not p.VAR_KEYWORD]
    given = dict(options or {})
    unknown = {key: given.pop(key) for key in options or {} if key not in known}
    if bad := [key for key in unknown if key in _TAKEN or not is_torch_option(key)]:
        raise InputError(
            f"{name} has {', '.join(map(repr, bad))}; expected keyword arguments of gpuparse.DataLoader, without "
            f"rank and world_size, which Lightning sets: {', '.join(known)}."
        )
    check_torch_options(unknown, known)
    return given
