"""The sides of the benchmark: each makes the slices that OpenCV makes, one that does not is caught."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import deque
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from oracle import encode_with_cv2, pad_as_reference, pad_to_square

import gpuparse
from gpuparse import SliceDataset
from gpuparse.bench import contest, worker
from gpuparse.bench.contest import Contestant, SideFailedError, gather_field
from gpuparse.bench.context import Context
from gpuparse.bench.data import BenchData, plain_sample, prepare
from gpuparse.bench.machine import tree_cpu_seconds, tree_memory_bytes
from gpuparse.bench.original import compare_with_original
from gpuparse.bench.settings import BenchSettings
from gpuparse.bench.sides import SIDES, PlainBatch, SideInfo
from gpuparse.bench.synthetic import cube_store, long_store, with_chunks

cv2 = pytest.importorskip("cv2")
SETTINGS = BenchSettings.choose("toy", "cpu")


@pytest.fixture(scope="module")
def data():
    """The small volumes and their stores."""
    with prepare(None, small=True) as found:
        yield found


@pytest.mark.parametrize("name", list(SIDES))
def test_a_side_makes_the_same_slices_and_full_batches(name, data):
    reason = SIDES[name].missing()
    if reason is not None:
        pytest.skip(reason)
    contestant = Contestant(name, data, SETTINGS)
    try:
        check = contestant.ask("check")
        assert check["passed"], check
        assert check["slices"] == 12
        assert check["largest_difference"] <= 1
        turn = contestant.ask("turn")  # looks at shapes and types of the batches itself
        assert turn["num_samples"] >= 6
        assert contestant.ask("memory_used")["memory_bytes"] > 50 << 20
        assert contestant.description["disk_bytes"] > 1000
    finally:
        contestant.close()
    assert contestant._process.returncode is not None


MONAI_ON_A_DEVICE = """
from gpuparse.bench.peers import monai_cache
side = monai_cache._MonaiSide(data, settings, monai_cache._Setup(0, threaded=True, device="cpu"))
"""


@pytest.mark.parametrize(
    ("name", "made"),
    [
        *((name, f"side = SIDES[{name!r}].make(data, settings, 0)") for name in ("monai", "nnunet", "dali-png")),
        pytest.param("monai", MONAI_ON_A_DEVICE, id="monai-device"),
    ],
)
def test_augmented_batches_follow_the_laws(name, made, data):
    """Half of the samples are untouched but for the swap; the others are shifted; masks stay masks."""
    reason = SIDES[name].missing()
    if reason is not None:
        pytest.skip(reason)
    code = f"""
import json, os, numpy as np, torch
from gpuparse.bench.data import BenchData
from gpuparse.bench.settings import BenchSettings
from gpuparse.bench.sides import SIDES
import cv2
cv2.setNumThreads(1)
data = BenchData.from_json(json.loads({json.dumps(json.dumps(data.to_json()))}))
settings = BenchSettings.choose("toy", "cpu")
{made}
batches = side.batches()
whole = noisy = salted = 0
masks = set()
for _ in range(120):
    batch = next(batches)
    for image, labels in zip(batch["image"].numpy(), batch["labels"].numpy()):
        whole += bool((image == np.round(image)).all() and image.min() >= 0)
        masks |= set(np.unique(labels).tolist())
        salted += bool(0.005 < np.isin(image, (0, 255)).all(axis=0).mean() and image.max() == 255)
print(json.dumps([whole, salted, sorted(masks)]), flush=True)
del batches
side.close()
os._exit(0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    whole, salted, masks = json.loads(done.stdout.splitlines()[-1])
    spread = 4.5 * np.sqrt(240 * 0.25)
    assert abs(whole - 120) < spread  # behind the gate: a shift by a fraction of a grey level
    assert masks == [0, 1]
    assert abs(salted - 60) < spread


class TestOnAGpu:
    """Configurations for `--device cuda`, as far as they go without a GPU."""

    SETTINGS = replace(BenchSettings.choose("toy", "cpu"), device="cuda")

    def test_peers_with_operators_there_offer_them_beside_those_of_the_cpu(self):
        for name, added in (("monai", "cache and transforms on the GPU"), ("dali-png", "GPU operators")):
            there = SIDES[name].variants(self.SETTINGS)
            assert len(there) == len(SIDES[name].variants(SETTINGS)) + 1
            assert added in there[-1]
            assert not any("GPU" in variant for variant in [*SIDES[name].variants(SETTINGS), *there[:-1]])

    def test_monais_cache_on_a_device_holds_what_the_one_of_the_cpu_holds(self, data):
        pytest.importorskip("monai")
        from monai.transforms import Compose

        from gpuparse.bench.peers.monai_cache import _deterministic

        transforms = [Compose(_deterministic(self.SETTINGS, device)) for device in (None, "cpu")]
        for ref in data.slices[::11]:
            ours, theirs = (transform({"ref": ref}) for transform in transforms)
            for key in ("image", "mask"):
                assert torch.equal(ours[key], theirs[key])

    @pytest.mark.parametrize("augment", [True, False])
    def test_dalis_graph_is_one_for_a_gpu(self, augment, tmp_path):
        pytest.importorskip("nvidia.dali")
        from gpuparse.bench.peers.dali_png import _DaliSide, _Files

        side = _DaliSide.__new__(_DaliSide)
        side._settings, side._on_gpu, side._classes = self.SETTINGS, True, [[1, 2, 3, 4]]
        side._data = SimpleNamespace(scratch=tmp_path)
        before = set(Path(tempfile.gettempdir()).glob("__autograph*"))
        # Defining checks each operator's device against its inputs'; building would want a driver.
        graph = side._define(_Files(["image.png"], ["mask.png"], [0]), 2, deque(), augment)
        assert graph.device_id == 0
        # Where DALI writes files that it leaves behind; of the same code it writes one.
        assert {path.suffix for path in tmp_path.iterdir()} <= {".py"}
        assert set(Path(tempfile.gettempdir()).glob("__autograph*")) <= before


class TestTrials:
    """Which configuration of a side is measured."""

    @pytest.fixture
    def rates(self, monkeypatch):
        """Configuration -> samples/s, an exception for one that fails; and which were closed."""
        rates, closed = {}, []

        class MadeUp:
            description: ClassVar[dict] = {}

            def __init__(self, name, data, settings, number=0):
                self.number = number

            def ask(self, do):
                rate = list(rates.values())[self.number]
                if isinstance(rate, Exception):
                    raise rate
                return {"samples_per_second": rate}

            def close(self):
                closed.append(self.number)

        monkeypatch.setattr(contest, "Contestant", MadeUp)
        monkeypatch.setattr(SideInfo, "variants", lambda self, settings: list(rates))
        return rates, closed

    def context(self):
        return Context(None, replace(SETTINGS, level="quick"), (), lambda _: None)

    def test_the_fastest_is_and_one_that_fails_is_told(self, rates):
        rates[0].update({"a": 3.0, "b": SideFailedError("out of memory"), "c": 5.0, "d": 4.0})
        context = self.context()
        contestant, about = contest._fastest("monai", context)
        assert contestant.number == 2
        assert about["configuration"] == "c"
        assert about["trials_samples_per_second"] == {"a": 3.0, "c": 5.0, "d": 4.0}
        assert about["trials_that_failed"] == {"b": "out of memory"}
        assert rates[1] == [0, 1, 2, 3]
        assert contest._fastest("monai", context)[0].number == 2  # goes by the trials that were made

    def test_where_all_fail_the_side_has_failed(self, rates):
        rates[0].update({"a": SideFailedError("out of memory"), "b": SideFailedError("no such module")})
        with pytest.raises(SideFailedError, match=r"^a: out of memory; b: no such module$"):
            contest._fastest("monai", self.context())


class TestCatching:
    """What a side's check and turn find out."""

    @staticmethod
    def worker(side, data, monkeypatch):
        monkeypatch.setitem(SIDES, "made-up", SideInfo("made up", "none"))
        monkeypatch.setattr(SideInfo, "import_libraries", lambda self: None)
        monkeypatch.setattr(SideInfo, "make", lambda self, *_: side)
        job = {"settings": SETTINGS.to_json(), "data": data.to_json(), "variant": 0}
        return worker._Worker("made-up", job)

    @pytest.mark.parametrize("change", ["nothing", "brighter", "mirrored mask"])
    def test_samples_that_are_others(self, change, data, monkeypatch):
        def plain(refs):
            made = [plain_sample(ref, (1, 2, 3, 4), 64, reference=False) for ref in refs]
            image, labels = (np.stack(arrays) for arrays in zip(*made, strict=True))
            if change == "brighter":
                image += 2
            elif change == "mirrored mask":
                labels = labels[..., ::-1]
            return PlainBatch(image, labels, np.tile([1, 2, 3, 4], (len(refs), 1)))

        check = self.worker(SimpleNamespace(plain=plain, num_ahead=0), data, monkeypatch).check()
        assert check["passed"] is (change == "nothing")

    def test_batches_of_another_type(self, data, monkeypatch):
        def batches():
            while True:
                yield {"image": torch.zeros(2, 3, 64, 64), "labels": torch.zeros(2, 4, 64, 64)}

        made_up = self.worker(SimpleNamespace(batches=batches, num_ahead=0), data, monkeypatch)
        with pytest.raises(RuntimeError, match=r"labels are torch\.float32"):
            made_up.turn()

    def test_batches_of_another_shape(self, data, monkeypatch):
        def batches():
            while True:
                yield {"image": torch.zeros(2, 3, 64, 32), "labels": torch.zeros(2, 4, 64, 64, dtype=torch.uint8)}

        made_up = self.worker(SimpleNamespace(batches=batches, num_ahead=0), data, monkeypatch)
        with pytest.raises(RuntimeError, match=r"images are \(2, 3, 64, 32\)"):
            made_up.turn()

    def test_bytes_become_whole_numbers_where_the_training_is(self, data, monkeypatch):
        masks = torch.randint(0, 2, (2, 4, 64, 64), dtype=torch.uint8)
        side = SimpleNamespace(batches=lambda: iter([{"image": torch.zeros(2, 3, 64, 64), "labels": masks}]))
        _, labels = self.worker(side, data, monkeypatch)._next()
        assert labels.dtype == torch.int64
        assert torch.equal(labels, masks.long())

    @pytest.mark.parametrize("held", [False, True])
    def test_training_is_timed_over_more_than_a_burst(self, held, data, monkeypatch):
        """What workers had ready is given at once, then nothing for a while."""
        taken = []

        def batches():
            while True:
                taken.append(1)
                yield {"image": torch.zeros(2, 3, 64, 64), "labels": torch.zeros(2, 4, 64, 64, dtype=torch.uint8)}

        made_up = self.worker(SimpleNamespace(batches=batches, num_ahead=7), data, monkeypatch)
        made_up.train(held)
        # The batch that is held, those that warm up, and twice what may be ready.
        assert len(taken) == (1 if held else 1 + 9 + 14)

    def test_a_side_that_is_left_out_says_why(self, data, monkeypatch):
        monkeypatch.setitem(SIDES, "absent", SideInfo("absent", "none", ("no_such_module",)))
        broken = BenchData(data.folder, data.names, data.scratch / "no stores", data.scratch)
        with gather_field(["absent", "gpuparse"], Context(broken, SETTINGS, (), lambda _: None)) as field:
            assert field.contestants == []
            assert field.left_out["absent"] == "no_such_module not installed"
            assert "StoreFormatError" in field.left_out["gpuparse"] or "InputError" in field.left_out["gpuparse"]

    def test_a_side_whose_check_fails_is_not_timed(self, data, monkeypatch):
        ask = Contestant.ask

        def answer(self, do, **arguments):
            result = ask(self, do, **arguments)
            return {**result, "passed": False} if do == "check" else result

        monkeypatch.setattr(Contestant, "ask", answer)
        with gather_field(["gpuparse"], Context(data, SETTINGS, (), lambda _: None)) as field:
            assert field.contestants == []
            assert field.left_out["gpuparse"].startswith("makes other samples: ")

    def test_a_process_that_ends_is_reported(self, data):
        contestant = Contestant("gpuparse", data, SETTINGS)
        contestant._process.kill()
        contestant._process.wait()
        with pytest.raises(SideFailedError, match="gpuparse: its process ended"):
            contestant.ask("turn")
        contestant.close()
        contestant = Contestant("gpuparse", data, SETTINGS)
        with pytest.raises(SideFailedError, match="KeyError: 'no_such'"):
            contestant.ask("no_such")
        with pytest.raises(SideFailedError, match="gpuparse: no answer to 'turn' within 0 s"):
            contestant.ask("turn", limit_seconds=0)
        contestant.close()

    def test_everybody_begins_a_round_in_turn(self):
        sides = [SimpleNamespace(name=name) for name in "abc"]
        orders = ["".join(side.name for side in order) for order in contest.Field(contestants=sides).rounds(4)]
        assert orders == ["abc", "bca", "cab", "abc"]


class TestData:
    """The volumes, and what OpenCV makes of them."""

    def test_plain_samples_are_the_tests_own_oracle_s(self, data):
        for ref in (data.slices[0], data.slices[5], data.slices[10], data.slices[40], data.slices[-1]):
            with np.load(ref.volume.path) as members:
                image, labels = members["imgs"], members["gts"]
            for reference in (False, True):
                pad = pad_as_reference if reference else pad_to_square
                found, masks = plain_sample(ref, (1, 5), 64, reference=reference)
                expected, ids = encode_with_cv2(
                    image, labels, axis=ref.axis, positions=[ref.position], size=(64, 64), pad=pad
                )
                np.testing.assert_array_equal(found, expected[0])
                np.testing.assert_array_equal(masks, [ids[0] == 1, ids[0] == 5])

    def test_slices_are_those_of_the_store(self, data):
        store = gpuparse.open_store(data.stores / "SMALL/train.zarr")
        table = store.slices
        mine = [(ref.volume.path.stem, ref.axis, ref.position) for ref in data.slices]
        names = [case.name for case in store.cases]
        rows = zip(table.case.tolist(), table.axis.tolist(), table.position.tolist(), strict=True)
        assert mine == [(names[case], axis, position) for case, axis, position in rows]

    def test_repeated_volumes_are_links(self, data, tmp_path):
        assert data.repeated(0, tmp_path / "none") is data
        many = data.repeated(2 * data.raw_bytes + 1, tmp_path / "many")
        assert len(many.volumes) == 3 * len(data.volumes)
        assert many.raw_bytes == 3 * data.raw_bytes
        assert all(volume.path.is_symlink() for volume in many.volumes)
        report = gpuparse.convert(many.folder, out_dir=tmp_path / "stores")
        assert report.datasets[0].num_slices == 3 * len(data.slices)

    def test_hidden_files_are_no_volumes(self, data, tmp_path):
        many = data.repeated(2 * data.raw_bytes, tmp_path / "many")
        (tmp_path / "many/SMALL/train/._volume.npz").write_bytes(b"what macOS puts into archives")
        again = BenchData(many.folder, many.names, many.stores, tmp_path)
        assert again.volumes == many.volumes
        assert sum(len(list((folder / "train").iterdir())) for folder in again.png_folders(16)) == len(many.slices)

    def test_the_generated_data_have_three_views(self, sample_dir, monkeypatch):
        from gpuparse.bench import data as module

        monkeypatch.setattr(module, "convert", lambda folder, out_dir: SimpleNamespace(datasets=[
            SimpleNamespace(name=path.name) for path in sorted(folder.iterdir()) if path.is_dir()
        ]))  # fmt: skip
        monkeypatch.setattr(module, "make_sample_data", lambda folder: shutil.copytree(sample_dir, folder))
        with prepare(None) as found:
            assert found.names == ("SAMPLE_CT", "SAMPLE_GRADES")
            assert {volume.axes for volume in found.volumes} == {(0,), (0, 1, 2)}
            with np.load(found.volumes[-1].path) as members:
                assert set(np.unique(members["gts"])) <= set(range(6))

    def test_settings_survive_a_pipe(self):
        assert BenchSettings.from_json(SETTINGS.to_json()) == SETTINGS


class TestSynthetic:
    """Stores made for one question."""

    def test_a_long_index_can_be_trained_on(self, tmp_path):
        store = long_store(tmp_path / "long", 1050)
        dataset = SliceDataset(store, img_size=(64, 64), transforms=None)
        assert len(dataset) == 1050
        assert len(dataset.store.cases) == 11
        table = dataset.store.slices
        assert table.case[-1] == 10
        assert table.position[-1] == 49
        np.testing.assert_array_equal(table.classes_in(1049), table.classes_in(49))
        np.testing.assert_array_equal(dataset[49]["image"], dataset[1049]["image"])

    def test_other_chunks_hold_the_same_voxels(self, tmp_path):
        store = cube_store(tmp_path / "cube", 44)
        other = with_chunks(store, tmp_path / "other.zarr", (1, 44, 44))
        first, second = (SliceDataset(path, img_size=(64, 64), transforms=None) for path in (store, other))
        assert first.store.layout(0, "0").chunks == (22, 22, 22)
        assert second.store.layout(0, "0").chunks == (1, 44, 44)
        for row in (0, 50, 131):
            np.testing.assert_array_equal(first[row]["image"], second[row]["image"])


class TestOriginal:
    """The comparison with the reference's own code, on a stand-in for it."""

    SCRIPT = """
datasets = ['A']
import cv2, json
from pathlib import Path
from gpuparse.bench.baselines.process_2d import write_png_tree
for name in datasets:
    write_png_tree(Path(), name, Path(name))
for path in sorted(Path(datasets[0]).glob("processed/train/*.png"))[:NUM_CHANGED]:
    image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    image[0, 0, 0] ^= 1
    cv2.imwrite(str(path), image)
"""
    DATASET = """
from pathlib import Path
from gpuparse.bench.baselines.augment import ReferenceAugmentation as DataAugmentation
from gpuparse.bench.baselines.dataset import PngDataset

class BiomedParseDataset(PngDataset):
    def __init__(self, root, transforms):
        super().__init__(Path(root), augmentation=transforms, seed=7)
        self.data_info = self.entries

    def __getitem__(self, index):
        item = super().__getitem__(index)
        item["image"] = item["image"] + ADDED
        return item
"""

    @pytest.mark.parametrize(("num_changed", "added"), [(0, 0), (2, 1)])
    def test_differences_are_counted(self, num_changed, added, tmp_path, monkeypatch):
        monkeypatch.setattr("gpuparse.bench.original._NUM_AUGMENTED", 1)
        checkout = tmp_path / "checkout"
        (checkout / "src/datasets").mkdir(parents=True)
        (checkout / "process_2D.py").write_text(self.SCRIPT.replace("NUM_CHANGED", str(num_changed)))
        (checkout / "src/datasets/biomedparse_dataset.py").write_text(self.DATASET.replace("ADDED", str(added)))
        with prepare(None, small=True) as found:
            result = compare_with_original(found, checkout, 2)
        assert result["png_files"] == 2 * 69
        assert result["png_files_that_differ"] == num_changed
        assert result["items_that_differ"] == (result["items"] if added else 0)
        assert len(result["augmentation_cpu_ms"]["anew"]["rounds"]) == 2


def test_a_process_and_its_children_are_counted():
    before = tree_cpu_seconds()
    total = 0
    while tree_cpu_seconds() - before < 0.05:
        total += sum(range(10_000))
    assert tree_memory_bytes() > 20 << 20
    reader, writer = os.pipe()
    block = bytearray(64 << 20)
    child = os.fork()
    if not child:
        block[::4096] = b"x" * (len(block) // 4096)
        os.write(writer, b"1")
        time.sleep(30)
        os._exit(0)
    os.read(reader, 1)
    try:
        assert tree_memory_bytes() > tree_memory_bytes(child)
        assert tree_memory_bytes(child) > 60 << 20
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
