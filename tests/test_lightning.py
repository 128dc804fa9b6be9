"""Lightning in one process: epochs, limits and validation, every place to resume from, the callback, refusals."""

from __future__ import annotations

import copy
import logging
import pickle
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers.logger import DummyLogger
from lightning_training import QUIET, Recorder, SaveAlways, make_data, samples_of
from torch.utils.data import DataLoader as TorchDataLoader

import gpuparse
from gpuparse.errors import InputError, MissingDependencyError
from gpuparse.integrations import lightning as integration
from gpuparse.integrations.lightning import GpuparseDataModule, LoaderReportCallback

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::UserWarning:torch")
OPTIONS = {"batch_size": 4, "seed": 7, "num_threads": 1}
NUM_BATCHES = 6
REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def data(sample_stores):
    return make_data([sample_stores[name].parent for name in ("SAMPLE_CT", "SAMPLE_CELLS")])


@pytest.fixture(scope="module")
def epochs(data):
    """The samples of each batch of three epochs, from the loader alone."""
    loader = gpuparse.DataLoader(data["train"], shuffle=True, **OPTIONS)
    return [[samples_of(batch) for batch in loader] for _ in range(3)]


def fit(model, data, checkpoint=None, **options):
    trainer = Trainer(**{**QUIET, **options})
    loaders = data if isinstance(data, LightningDataModule) else GpuparseDataModule(**data, options=OPTIONS)
    trainer.fit(model, loaders, ckpt_path=checkpoint)
    return trainer


def expected(epochs, num_batches=NUM_BATCHES):
    return [[e, b, samples] for e, epoch in enumerate(epochs) for b, samples in enumerate(epoch[:num_batches])]


# Epochs, limits, validation.


class Bar(TQDMProgressBar):
    """Keeps the bars' totals."""

    def __init__(self):
        super().__init__()
        self.train_totals, self.val_totals = [], []

    def on_train_batch_end(self, *arguments):
        super().on_train_batch_end(*arguments)
        self.train_totals.append((self.train_progress_bar.n, self.train_progress_bar.total))

    def on_validation_batch_start(self, *arguments):
        super().on_validation_batch_start(*arguments)
        self.val_totals.append(self.val_progress_bar.total)


def test_epochs_limits_validation_and_progress_are_what_the_trainer_was_told(data, epochs):
    bar = Bar()
    model = Recorder()
    options = {"max_epochs": 3, "limit_train_batches": 5, "val_check_interval": 2, "num_sanity_val_steps": 2}
    trainer = fit(model, data, callbacks=[bar], enable_progress_bar=True, **options)
    assert model.trained == expected(epochs, num_batches=5)
    assert trainer.num_training_batches == 5
    assert bar.train_totals == [(n, 5) for n in range(1, 6)] * 3
    # 9 samples in batches of 4, then 4 of the other dataset: twice in each epoch, always the same.
    assert bar.val_totals[-4:] == [3, 3, 3, 1]
    first = [samples_of(batch) for part in data["val"] for batch in gpuparse.DataLoader(part, **OPTIONS)]
    assert [len(samples) for samples in first] == [4, 4, 1, 4]
    assert model.validated == [
        [step, part, samples]
        for step in (2, 4, 7, 9, 12, 14)
        for part, samples in zip((0, 0, 0, 1), first, strict=True)
    ]


def test_epochs_go_on_when_loaders_are_made_anew_and_when_fit_is_called_again(data, epochs):
    model = Recorder()
    datamodule = GpuparseDataModule(**data, options=OPTIONS)
    trainer = fit(model, datamodule, max_epochs=2, limit_val_batches=0, reload_dataloaders_every_n_epochs=1)
    assert model.trained == expected(epochs[:2])
    trainer.fit_loop.max_epochs = 3
    trainer.fit(model, datamodule)
    assert model.trained == expected(epochs)


def test_validate_and_test_need_no_training_data_and_take_their_own_options(data):
    made = []

    def cells():
        made.append(1)
        return data["val"][1]

    model = Recorder()
    model.test_step = lambda batch, batch_idx: model.trained.append(samples_of(batch))
    datamodule = GpuparseDataModule(
        val=cells, test=cells, options={**OPTIONS, "shuffle": True, "drop_last": True}, eval_options={"batch_size": 3}
    )
    trainer = Trainer(**QUIET)
    for _ in range(2):
        trainer.validate(model, datamodule, verbose=False)
        trainer.test(model, datamodule, verbose=False)
    one = [samples_of(batch) for batch in gpuparse.DataLoader(data["val"][1], 3, num_threads=1)]
    assert [len(samples) for samples in one] == [3, 1]
    assert [samples for _, _, samples in model.validated] == one + one
    assert model.trained == one + one
    assert len(made) == 2  # once for each part


def test_without_validation_data_there_is_none(data, epochs):
    model = Recorder()
    fit(model, {"train": data["train"]}, max_epochs=1)
    assert model.trained == expected(epochs[:1])
    assert model.validated == []


def test_the_device_is_the_trainers_and_without_a_trainer_the_loader_is_a_plain_one(data):
    datamodule = GpuparseDataModule(data["train"], options=OPTIONS)
    assert type(datamodule.train_dataloader()) is gpuparse.DataLoader
    assert next(iter(datamodule.train_dataloader()))["image"].shape == (4, 3, 32, 32)
    datamodule.trainer = types.SimpleNamespace(
        strategy=types.SimpleNamespace(root_device=torch.device("cpu")), fit_loop=None, train_dataloader=None
    )
    assert datamodule.train_dataloader().device.type == "cpu"
    assert datamodule._device() == {"device": "cpu"}
    datamodule.trainer.strategy.root_device = torch.device("cuda", 1)
    assert datamodule._device() == {}


# Resuming.

# Options of a run, and the places to resume from: hook and number of batches trained on by then.
MODES = {
    "whole epochs": (
        {"max_epochs": 2},
        [
            ("batch end", 1),
            ("batch end", 6),
            ("batch end", 8),
            ("validation end", 6),
            ("epoch end", 6),
            ("in a step", 8),
        ],
    ),
    "limited": (
        {"max_epochs": 2, "limit_train_batches": 4, "val_check_interval": 3},
        [("batch end", 4), ("validation end", 7), ("epoch end", 4), ("in a step", 0), ("in a step", 6)],
    ),
    "steps": (
        {"max_epochs": -1, "max_steps": 8, "limit_val_batches": 0},
        [("batch end", 6), ("epoch end", 6), ("in a step", 7)],
    ),
    "limited steps": (
        {"max_epochs": -1, "max_steps": 10, "limit_train_batches": 4, "limit_val_batches": 0},
        [("batch end", 4), ("epoch end", 4), ("epoch end", 8)],
    ),
}


@pytest.mark.parametrize("mode", MODES)
def test_a_run_resumed_from_any_checkpoint_trains_on_what_the_undisturbed_run_does(data, mode, tmp_path):
    options, places = MODES[mode]
    whole, save = Recorder(), SaveAlways(tmp_path)
    fit(whole, data, callbacks=[save], **options)
    checkpoints = {(hook, num_trained): path for hook, path, num_trained in save.saved}
    # In the middle of a step, the batch that was taken has not been trained on.
    for num_trained in [count for hook, count in places if hook == "in a step"]:
        epoch, number, _ = whole.trained[num_trained]
        (tmp_path / str(num_trained)).mkdir()
        save = SaveAlways(tmp_path / str(num_trained))
        with pytest.raises(RuntimeError, match="failed on purpose"):
            fit(Recorder(fail_at=(epoch, number)), data, callbacks=[save], **options)
        checkpoints["in a step", num_trained] = save.saved[-1][1]
        assert save.saved[-1][::2] == ("in a step", num_trained)
    for hook, num_trained in places:
        model = Recorder()
        trainer = fit(model, data, checkpoints[hook, num_trained], **options)
        assert model.trained == whole.trained[num_trained:], (hook, num_trained)
        assert model.validated == whole.validated[len(whole.validated) - len(model.validated) :]
        assert trainer.global_step == len(whole.trained)


@pytest.mark.parametrize("limits", [{}, {"limit_train_batches": 4}])
@pytest.mark.parametrize("first", [{"max_epochs": 1}, {"max_steps": NUM_BATCHES}, {"max_steps": 3}, {"max_steps": 8}])
@pytest.mark.parametrize("then", [{"max_steps": 14}, {"max_epochs": 4}])
def test_a_checkpoint_saved_after_fit_leaves_no_batch_out(data, tmp_path, limits, first, then):
    options = {**limits, "limit_val_batches": 0}
    whole = Recorder()
    fit(whole, data, max_epochs=6, **options)
    model, datamodule = Recorder(), GpuparseDataModule(**data, options=OPTIONS)
    trainer = fit(model, datamodule, **first, **options)
    trainer.validate(model, datamodule, verbose=False)  # leaves the place in training alone
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    more = Recorder()
    again = fit(more, data, tmp_path / "x.ckpt", **then, **options)
    trained = [samples for _, _, samples in model.trained + more.trained]
    assert trained == [samples for _, _, samples in whole.trained][: len(trained)]
    assert len(more.trained) >= 5
    # And once more, from the run that was resumed, with the loaders made anew for each epoch.
    again.save_checkpoint(tmp_path / "y.ckpt")
    last = Recorder()
    fit(last, data, tmp_path / "y.ckpt", max_steps=len(whole.trained), reload_dataloaders_every_n_epochs=1, **options)
    trained += [samples for _, _, samples in last.trained]
    assert trained == [samples for _, _, samples in whole.trained][: len(trained)]
    assert len(trained) == len(whole.trained)


class SaveAtStart(Callback):
    """Saves before the first batch, and asks for a loader of its own."""

    def __init__(self, path):
        self.path = path

    def on_train_start(self, trainer, model):
        next(iter(trainer.datamodule.train_dataloader()))
        trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("place", [("batch end", 8), ("validation end", 6), ("epoch end", 6)])
def test_a_checkpoint_saved_before_the_first_batch_of_a_resumed_run_is_the_one_it_came_from(data, tmp_path, place):
    whole, save = Recorder(), SaveAlways(tmp_path)
    fit(whole, data, callbacks=[save], max_epochs=2)
    (path,) = [path for hook, path, num_trained in save.saved if (hook, num_trained) == place]
    again = SaveAtStart(tmp_path / "again.ckpt")
    fit(Recorder(), data, path, callbacks=[again], max_epochs=2)
    model = Recorder()
    fit(model, data, tmp_path / "again.ckpt", max_epochs=2)
    assert model.trained == whole.trained[place[1] :]


@pytest.mark.parametrize("hook", ["batch end", "epoch end"])
def test_a_loader_without_the_data_module_resumes_too(data, epochs, tmp_path, hook):
    def train(checkpoint=None):
        model, save = Recorder(), SaveAlways(tmp_path)
        trainer = Trainer(**QUIET, max_epochs=2, callbacks=[] if checkpoint else [save])
        trainer.fit(model, gpuparse.DataLoader(data["train"], shuffle=True, **OPTIONS), ckpt_path=checkpoint)
        return model.trained, save.saved

    trained, saved = train()
    assert trained == expected(epochs[:2])
    path, num_trained = next((path, n) for found, path, n in saved if found == hook and n in (NUM_BATCHES, 8))
    assert train(path)[0] == trained[num_trained:]


def test_a_checkpoint_of_another_batch_size_goes_on_at_its_sample_and_says_what_lightning_miscounts(
    data, tmp_path, caplog
):
    save = SaveAlways(tmp_path)
    fit(Recorder(), data, callbacks=[save], max_epochs=1)
    (path,) = [path for hook, path, num_trained in save.saved if (hook, num_trained) == ("batch end", 3)]
    model = Recorder()
    with caplog.at_level(logging.WARNING, logger="gpuparse"):
        fit(model, GpuparseDataModule(data["train"], options={**OPTIONS, "batch_size": 2}), path, max_epochs=1)
    assert "Resuming at sample 12 of epoch 0, but Lightning counts 3 batches of 2 samples there" in caplog.text
    loader = gpuparse.DataLoader(data["train"], shuffle=True, **OPTIONS)
    rest = [sample for batch in loader for sample in samples_of(batch)][12:]
    assert [sample for _, _, samples in model.trained for sample in samples] == rest


def test_a_checkpoint_of_other_data_is_refused(data, tmp_path):
    save = SaveAlways(tmp_path)
    fit(Recorder(), data, callbacks=[save], max_epochs=1, limit_train_batches=2)
    with pytest.raises(InputError, match="the loader's state belongs to another run: datasets or order"):
        fit(Recorder(), {"train": data["val"][0]}, save.saved[0][1], max_epochs=1, limit_train_batches=2)


# The callback.


class Log(DummyLogger):
    def __init__(self):
        super().__init__()
        self.lines = []

    def log_metrics(self, metrics, step=None):
        if "loader/num_batches" in metrics:
            assert {type(value) for value in metrics.values()} == {float}
            self.lines.append((step, metrics["loader/num_batches"]))


@pytest.mark.parametrize(
    ("every", "options", "lines"),
    [
        (2, {}, [(1, 2), (3, 4), (5, 6), (7, 8), (9, 10), (11, 12)]),
        (None, {"log_every_n_steps": 4}, [(3, 4), (7, 8), (11, 12)]),
        (2, {"accumulate_grad_batches": 3}, [(1, 6), (3, 12)]),
    ],
)
def test_the_callback_logs_the_report_every_few_steps(data, every, options, lines):
    log = Log()
    callback = LoaderReportCallback(every)
    fit(Recorder(), {"train": data["train"]}, callbacks=[callback], logger=[log], max_epochs=2, **options)
    assert log.lines == lines


def test_the_callback_refuses_other_loaders_and_steps_below_1(data):
    with pytest.raises(InputError, match="log_every_n_steps is 0; expected a whole number of at least 1"):
        LoaderReportCallback(0)
    trainer = Trainer(**QUIET, max_epochs=1, callbacks=[LoaderReportCallback()])
    with pytest.raises(InputError, match=r"training loader is DataLoader; expected gpuparse\.DataLoader"):
        trainer.fit(Recorder(), TorchDataLoader(data["train"], 4))


def test_the_page_on_lightning_runs_as_it_stands(sample_stores, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpuparse-demo").mkdir()
    (tmp_path / "gpuparse-demo" / "stores").symlink_to(sample_stores["SAMPLE_CT"].parents[1])
    (code,) = re.findall(
        r"```python\n(.*?)```", (REPOSITORY / "docs" / "lightning.md").read_text(encoding="utf-8"), re.DOTALL
    )
    names = {}
    exec(code, names)
    trainer = names["trainer"]
    assert (trainer.current_epoch, trainer.global_step) == (2, 10)
    state = trainer.train_dataloader.state_dict()
    assert (state["epoch"], state["position"]) == (1, 5 * 8)
    assert "loader/num_batches" in Path(trainer.logger.log_dir, "metrics.csv").read_text(encoding="utf-8")


# Refusals.


@pytest.mark.parametrize("name", ["options", "eval_options"])
def test_options_the_loader_does_not_have_are_refused_by_name(data, name):
    with pytest.raises(InputError, match=rf"^{name} has 'num_threds', 'rank'; expected .*batch_size, shuffle"):
        GpuparseDataModule(data["train"], **{name: {"num_threds": 4, "rank": 0, "batch_size": 2}})
    with pytest.raises(InputError, match=rf"^{name} has 'torch_options'; expected .*batch_size, shuffle"):
        GpuparseDataModule(data["train"], **{name: {"torch_options": {"pin_memory": True}}})
    with pytest.raises(InputError, match=r"collate_fn is given; gpuparse.DataLoader has none"):
        GpuparseDataModule(data["train"], **{name: {"collate_fn": list}})


def test_options_of_torchs_loader_without_meaning_are_left_out_and_named(data, caplog):
    datamodule = GpuparseDataModule(data["train"], options={**OPTIONS, "num_workers": 4, "pin_memory": False})
    assert dict(datamodule.options) == OPTIONS
    (record,) = caplog.records
    assert record.getMessage().startswith("DataLoader: num_workers=4 has no effect: num_threads and prefetch_depth say")


def test_options_are_kept_as_they_were_given(data):
    given = dict(OPTIONS)
    datamodule = GpuparseDataModule(data["train"], options=given)
    given["batch_size"] = 5
    assert dict(datamodule.options) == OPTIONS
    with pytest.raises(TypeError):
        datamodule.options["batch_size"] = 5
    for copied in (copy.deepcopy(datamodule), pickle.loads(pickle.dumps(datamodule))):  # as ddp_spawn sends it
        assert dict(copied.options) == OPTIONS
        assert len(copied.train_dataloader()) == len(datamodule.train_dataloader())


@pytest.mark.parametrize("options", [[1, 2], "ab", 3])
def test_options_are_a_mapping(options):
    with pytest.raises(
        InputError, match=r"eval_options is .*; expected keyword arguments of gpuparse\.DataLoader, in a"
    ):
        GpuparseDataModule(eval_options=options)


def test_printing_makes_no_batch(data, monkeypatch):
    monkeypatch.setattr(gpuparse.DataLoader, "__iter__", None)
    datamodule = GpuparseDataModule(data["train"], tuple(data["val"]), options={"batch_size": 2})
    assert str(datamodule) == (
        f"GpuparseDataModule(train=[{data['train']!r}], val={data['val']!r}, options={{'batch_size': 2}}, "
        "eval_options={})"
    )


@pytest.mark.parametrize("convert", ["none", "partial", "all", "object"])
def test_hydra_makes_it_with_any_kind_of_lists(sample_stores, convert):
    hydra = pytest.importorskip("hydra")
    dataset = {"_target_": "gpuparse.SliceDataset", "img_size": [32, 32]}
    folders = [str(sample_stores[name].parent) for name in ("SAMPLE_CT", "SAMPLE_CELLS")]
    config = {
        "_target_": "gpuparse.integrations.lightning.GpuparseDataModule",
        "_convert_": convert,
        "val": [{**dataset, "root_dir": folder} for folder in folders],
        "test": [{**dataset, "root_dir": folders[0], "_partial_": True}],
        "options": {"batch_size": 3},
    }
    datamodule = hydra.utils.instantiate(config)
    assert [loader.dataset.name for loader in datamodule.val_dataloader()] == ["SAMPLE_CT", "SAMPLE_CELLS"]
    assert [loader.dataset.name for loader in datamodule.test_dataloader()] == ["SAMPLE_CT"]
    assert datamodule.options == {"batch_size": 3}


@pytest.mark.parametrize(("train", "count"), [(None, 0), (["a", "b"], 2)])
def test_training_needs_one_dataset(data, train, count):
    train = train and [data["train"], data["train"]]
    with pytest.raises(InputError, match=f"has {count} training datasets; expected one. Pass train=.*ConcatDataset"):
        GpuparseDataModule(train).train_dataloader()


@pytest.mark.parametrize("part", ["train", "val", "test"])
@pytest.mark.parametrize("given", ["folder", 3, [lambda: None, "folder"], (None,)])
def test_data_are_datasets_or_functions(part, given):
    with pytest.raises(InputError, match=rf"{part} is or has ('folder'|3|None); expected a dataset, such as gpuparse"):
        GpuparseDataModule(**{part: given})


def test_lightning_is_taken_under_the_name_that_is_in_use(monkeypatch):
    other = types.ModuleType("pytorch_lightning")
    monkeypatch.setitem(sys.modules, "pytorch_lightning", other)
    assert integration._import_lightning() is sys.modules["lightning.pytorch"]
    monkeypatch.delitem(sys.modules, "lightning.pytorch")
    assert integration._import_lightning() is other


def test_without_lightning_the_remedy_is_named(monkeypatch):
    for name in ("lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependencyError, match=r"needs Lightning.*pip install gpuparse\[lightning\]"):
        integration._import_lightning()
