"""The device bench at toy size on the CPU, what it counts, the baseline it compares with, and the scripts around it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from oracle import encode_with_cv2

import gpuparse
from gpuparse import SliceDataset, kernels
from gpuparse.augment import LabelSpec, OutputTypes
from gpuparse.pack import pack
from gpuparse.read import ChunkReader
from gpuparse.sampling import identity_params

REPOSITORY = Path(__file__).parents[1]
BENCH = REPOSITORY / "bench"
sys.path.insert(0, str(BENCH))


@pytest.fixture(scope="module")
def volumes(tmp_path_factory):
    """A folder with the few volumes of the short run."""
    from small_pipeline import write_volumes

    folder = tmp_path_factory.mktemp("volumes")
    write_volumes(folder)
    return folder


@pytest.fixture(scope="module")
def toy(tmp_path_factory, volumes):
    """(printed, JSON) of a run of the command at toy size."""
    path = tmp_path_factory.mktemp("bench") / "new" / "device.json"
    command = [sys.executable, BENCH / "bench_device.py", "--device", "cpu", "--toy", "--data", volumes, "--json", path]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # threads that wait for each other on a busy machine
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, json.loads(path.read_text(encoding="utf-8"))


def test_every_part_has_run_or_says_why_not(toy):
    printed, result = toy
    parts = result["parts"]
    assert list(parts) == ["kernels", "inflate", "launching", "loader", "training"]
    assert parts["inflate"]["not_run"] == parts["launching"]["not_run"] == "needs a GPU"
    assert not any("not_run" in parts[name] or "failed" in parts[name] for name in ("kernels", "loader", "training"))
    assert result["toy"] is True
    assert result["machine"].keys() >= {"commit", "versions", "python", "cores", "device", "kernel_sources", "command"}
    assert "parts.loader.speedup.ratio:" in printed


def test_figures_belong_together(toy):
    parts = toy[1]["parts"]
    for name, itemsize in (("int64", 8), ("uint8", 1)):
        found = parts["kernels"]["labels"][name]
        assert 0 < found["fraction_of_planes_in_several_chunks"] < 1
        assert found["equals_the_host"] is True
        moved = found["bytes_per_batch"]
        assert moved["image_written"] == 4 * 3 * 64 * 64 * 4
        assert moved["labels_written"] == 4 * 4 * 64 * 64 * itemsize
        floor = sum(moved.values()) / parts["kernels"]["copy_bytes_per_second"]
        assert found["floor_microseconds"] == pytest.approx(floor * 1e6)
        assert found["floor_samples_per_second"] == pytest.approx(4 / floor)
        fraction = found["floor_microseconds"] / found["both_microseconds"]["median"]
        assert found["fraction_of_the_floors_rate"] == pytest.approx(fraction)
    loader = parts["loader"]
    sides = [loader[name]["samples_per_second"] for name in ("gpuparse", "reference")]
    assert [len(side["rounds"]) for side in sides] == [2, 2]
    assert loader["speedup"]["ratio"] == pytest.approx(sides[0]["median"] / sides[1]["median"])
    steps = parts["training"]["milliseconds_per_step"]
    ratio = parts["training"]["loader_over_held"]
    assert ratio["ratio"] == pytest.approx(steps["loader"]["median"] / steps["held"]["median"])
    assert ratio["ratio_95"][0] <= ratio["ratio"] <= ratio["ratio_95"][1]


def test_a_part_that_fails_does_not_stop_the_others(monkeypatch, capsys, tmp_path):
    import bench_device

    def fail(*_):
        raise RuntimeError("made to fail")

    monkeypatch.setitem(bench_device.PARTS, "inflate", fail)
    path = tmp_path / "device.json"
    arguments = ["--device", "cpu", "--toy", "--part", "inflate", "--part", "launching", "--json", str(path)]
    with pytest.raises(SystemExit, match="failed: inflate"):
        bench_device.main(arguments)
    result = json.loads(path.read_text(encoding="utf-8"))
    assert result["data"] == {"datasets": ["SMALL"], "generated": True}
    parts = result["parts"]
    assert parts["inflate"]["failed"] == "RuntimeError: made to fail"
    assert parts["launching"]["not_run"] == "needs a GPU"
    capsys.readouterr()


def test_workers_that_do_not_fit_in_shared_memory_are_not_started(monkeypatch):
    from ondevice import loading
    from ondevice.setup import Settings

    from gpuparse.bench.context import NotRunError

    settings = Settings(torch.device("cpu"), num_workers=2)
    batch_bytes = 32 * 512 * 512 * (3 * 4 + 4 * 8)
    for free, expected in ((6 * batch_bytes, 2), (4 * batch_bytes, 1)):
        monkeypatch.setattr(loading.shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        assert loading._prefetch_factor(settings) == expected
    monkeypatch.setattr(loading.shutil, "disk_usage", lambda _: SimpleNamespace(free=4 * batch_bytes - 1))
    with pytest.raises(NotRunError, match=r"/dev/shm has 1\.4 GiB free; 2 workers need 1\.4"):
        loading._prefetch_factor(settings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "/nowhere"], "--data is /nowhere; expected a folder with class_prompts.json"),
        (["--device", "cuda"], "--device is cuda, and torch finds no GPU; expected one, or --device cpu"),
    ],
)
def test_unusable_arguments_are_refused(arguments, message, monkeypatch, capsys):
    import bench_device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        bench_device.main(arguments)
    assert message in capsys.readouterr().err


class TestFloor:
    """Bytes are counted plane by plane, each once."""

    @staticmethod
    def packed(store, keys):
        dataset = SliceDataset(store, img_size=(64, 64))
        samples = dataset.describe(np.array(keys), 0)
        labels = LabelSpec(np.ones((len(keys), 4), np.int32), np.zeros(len(keys), np.int32), stacked=True)
        params = identity_params(len(keys))
        return pack(ChunkReader(), samples.keys, params, labels, (64, 64), OutputTypes("float16", "uint8"))

    @pytest.mark.parametrize("axis", [0, 1, 2])
    def test_of_distinct_overlapping_and_missing_planes(self, write_case, data_dir, axis):
        from ondevice.floor import traffic

        shape = (40, 37, 44)
        image = np.random.default_rng(0).integers(1, 256, shape, np.uint8)
        labels = np.zeros(shape, np.uint16)
        labels[20:, 20:, 22:] = 300  # the other chunks of the labels are never written
        write_case(image, labels, spacing=(1, 1, 1), prompts={"300": ["thing"]})
        store = gpuparse.convert(data_dir).datasets[0].store_path
        dataset = SliceDataset(store, views=(axis,))
        rows = [int(np.flatnonzero(dataset.store.slices.axis == axis)[i]) for i in (30, 31, 30)]
        moved = traffic(self.packed(store, rows), (64, 64), OutputTypes("float16", "uint8"))
        plane = int(np.prod(shape)) // shape[axis]
        assert moved.image_read == 4 * plane  # slices 29, 30, 31, 32: each once
        chunks = dataset.store.layout(0, "labels/gts/0").chunks
        there = [axis_start // chunk * chunk for axis_start, chunk in zip((20, 20, 22), chunks, strict=True)]
        sides = [n - start for n, start in zip(shape, there, strict=True)]
        assert moved.labels_read == 2 * 2 * int(np.prod(sides)) // sides[axis]
        assert moved.image_written == 3 * 3 * 64 * 64 * 2
        assert moved.labels_written == 3 * 4 * 64 * 64
        assert moved.num_bytes == sum(vars(moved).values())
        assert moved.seconds(1e6) == pytest.approx(moved.num_bytes / 1e6)


class TestPngBaseline:
    """The reference's files and items, written anew."""

    @pytest.fixture
    def written(self, write_case, data_dir, tmp_path):
        from gpuparse.bench.baselines.process_2d import write_png_tree

        random = np.random.default_rng(0)
        image = random.integers(0, 256, (40, 37, 44), np.uint8)
        labels = random.integers(0, 4, image.shape).astype(np.uint8)
        write_case(image, labels, spacing=(1, 1, 1))
        return image, labels, write_png_tree(data_dir, "DATA", tmp_path / "png", 64)

    def test_files_are_the_encoded_slices(self, written):
        image, labels, folders = written
        assert [folder.name for folder in folders] == ["processed", "processed_view1", "processed_view2"]
        for axis, folder in enumerate(folders):
            positions = range(image.shape[axis])
            expected, masks = encode_with_cv2(image, labels, axis=axis, positions=positions, size=(64, 64))
            for i in positions:
                name = f"case{f'_view{axis}' if axis else ''}_{i:03d}.png"
                file = cv2.imread(str(folder / "train" / name), cv2.IMREAD_UNCHANGED)
                np.testing.assert_array_equal(np.moveaxis(file, 2, 0), expected[i])
                mask = cv2.imread(str(folder / "train_mask" / name), cv2.IMREAD_UNCHANGED)
                np.testing.assert_array_equal(mask, masks[i])

    def test_axes_are_those_of_conversion(self):
        from gpuparse.bench.baselines.process_2d import slice_axes
        from gpuparse.views import select_axes

        random = np.random.default_rng(0)
        for _ in range(300):
            shape = tuple(int(n) for n in random.integers(5, 60, 3))
            spacing = random.choice([1.0, 1.05, 1.3], 3)
            assert slice_axes(shape, spacing) == list(select_axes(shape, tuple(spacing)))

    def test_items_have_the_references_form(self, written):
        from gpuparse.bench.baselines.dataset import PngDataset

        _, labels, folders = written
        dataset = PngDataset(folders[0], num_prompts=2, seed=1)
        for index in (0, 7, 39):
            item = dataset[index]
            ids = [int(n) for n in item["class_ids"].split("&")]
            assert len(set(ids)) == 2
            assert item["text"] == "[SEP]".join(f"structure {n}" for n in ids)
            assert (item["image"].dtype, item["labels"].dtype) == (torch.float32, torch.int64)
            _, masks = encode_with_cv2(labels, labels, axis=0, positions=[index], size=(64, 64))
            np.testing.assert_array_equal(item["labels"], np.stack([masks[0] == n for n in ids]))
            file = cv2.imread(str(folders[0] / "train" / f"case_{index:03d}.png"), cv2.IMREAD_UNCHANGED)
            planes = np.moveaxis(file, 2, 0)
            assert any(np.array_equal(item["image"], planes[order]) for order in ([0, 1, 2], [0, 2, 1]))
            assert Path(item["mask_file"]).name == f"case_{index:03d}.png"
            assert (item["instance_label"], item["multiclass_label"]) == (0, False)

    def test_binary_pictures_are_blanked_and_instances_repeated(self, written):
        from gpuparse.bench.baselines.dataset import PngDataset

        folder = written[2][0]
        mask = np.zeros((64, 64), np.uint8)
        mask[5:9] = 255
        cv2.imwrite(str(folder / "train_mask" / "case_003.png"), mask)
        blank = PngDataset(folder)[3]
        assert not blank["image"].any()
        assert not blank["labels"].any()
        content = json.loads((folder / "train.json").read_text(encoding="utf-8"))
        for entry in content["annotations"]:
            entry["instance_label"] = 1
        (folder / "train.json").write_text(json.dumps(content))
        item = PngDataset(folder, num_prompts=3)[4]
        stored = cv2.imread(str(folder / "train_mask" / "case_004.png"), cv2.IMREAD_UNCHANGED)
        assert item["class_ids"] == "1&1&1"
        np.testing.assert_array_equal(item["labels"], [stored] * 3)

    def test_a_lost_file_is_named(self, written):
        from gpuparse.bench.baselines.dataset import PngDataset

        folder = written[2][0]
        (folder / "train_mask" / "case_003.png").unlink()
        with pytest.raises(FileNotFoundError, match=r"case_003\.png' or its image cannot be read"):
            PngDataset(folder)[3]


def test_the_training_net_is_of_resnet_50s_size():
    from ondevice.training import network

    model = network(64, 1000)
    assert sum(p.numel() for p in model.parameters()) == 25_557_032  # torchvision.models.resnet50
    assert network(2)(torch.zeros(2, 3, 64, 64)).shape == (2, 4)


class TestScripts:
    """The scripts as far as they go without a GPU."""

    def test_the_offline_build_makes_a_checkout_usable(self, tmp_path):
        shutil.copytree(REPOSITORY / "kernels", tmp_path / "kernels")
        shutil.copytree(
            REPOSITORY / "gpuparse", tmp_path / "gpuparse", ignore=shutil.ignore_patterns("_native", "__pycache__")
        )
        (tmp_path / "bench").mkdir()
        shutil.copy(BENCH / "install_offline.sh", tmp_path / "bench")
        done = subprocess.run([tmp_path / "bench/install_offline.sh"], capture_output=True, encoding="utf-8", cwd="/")
        assert done.returncode == 0, done.stderr
        assert f"digest {kernels.source_digest()[:12]}" in done.stdout
        # An editable install puts a finder of its own before the path: it goes.
        code = (
            "import sys\n"
            "sys.meta_path[:] = [f for f in sys.meta_path if not type(f).__module__.startswith('_editable')]\n"
            "import numpy as np, gpuparse\n"
            "from gpuparse import kernels\n"
            "image = np.random.default_rng(0).integers(0, 256, (3, 50, 41), np.uint8)\n"
            "for variant in ('baseline', None):\n"
            "    print(kernels.host_library(variant)._name)\n"
            "print(gpuparse.encode(image).image.sum(dtype=np.int64))\n"
        )
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        run = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, encoding="utf-8", env=environment, cwd="/"
        )
        assert run.returncode == 0, run.stderr
        *libraries, total = run.stdout.split()
        assert {Path(name).parent for name in libraries} == {tmp_path / "gpuparse/_native"}
        image = np.random.default_rng(0).integers(0, 256, (3, 50, 41), np.uint8)
        assert int(total) == gpuparse.encode(image).image.sum(dtype=np.int64)
        missing = subprocess.run(
            [tmp_path / "bench/install_offline.sh"],
            capture_output=True,
            encoding="utf-8",
            env={**os.environ, "CXX": "no-g++"},
        )
        assert missing.returncode == 1
        assert "no C++ compiler 'no-g++'; expected g++ 9 or newer" in missing.stderr

    def test_the_offline_build_has_cmakes_flags(self):
        cmake = (REPOSITORY / "kernels/CMakeLists.txt").read_text(encoding="utf-8")
        script = (BENCH / "install_offline.sh").read_text(encoding="utf-8")
        built = set(re.search(r"flags=\((.*)\)", script)[1].split())
        assert built - {"-std=c++17", "-fPIC", "-shared", "-pthread"} == {
            flag for flag in re.search(r"PRIVATE (-O3[^$]*)\$", cmake)[1].split() if not flag.startswith("-W")
        }
        assert re.search(r"flags\+=\((.*)\)", script)[1] == re.search(r"COMPILER_ID:GNU>:(.*)>\)", cmake)[1]
        avx2 = re.search(r"gpuparse_kernels_avx2 (-.*)\)", cmake)[1].split()
        assert re.search(r"avx2=\((.*)\)", script)[1].split() == avx2

    @pytest.fixture
    def stubs(self, tmp_path):
        """A folder of programs that write down how they were called; `fail` names those that do not succeed."""
        folder = tmp_path / "bin"
        folder.mkdir()

        def make(fail=()):
            for name in ("python3", "nvidia-smi", "compute-sanitizer"):
                status = f'case "$*" in {"|".join(fail)}) exit 3;; esac' if fail else ""
                (folder / name).write_text(
                    f'#!/bin/sh\necho "{name} $* require=$GPUPARSE_REQUIRE_GPU" >>{tmp_path}/calls\n{status}\n'
                )
                (folder / name).chmod(0o755)
            return {"PATH": f"{folder}:/usr/bin:/bin", "OUT": str(tmp_path / "out")}

        return make

    def test_one_call_runs_everything_but_the_peers(self, stubs, tmp_path):
        done = subprocess.run([BENCH / "run_on_gpu.sh"], capture_output=True, encoding="utf-8", env=stubs())
        assert done.returncode == 0, done.stdout + done.stderr
        calls = [
            line
            for line in (tmp_path / "calls").read_text(encoding="utf-8").splitlines()
            if "host_library" not in line and "gpuparse.loader" not in line
        ]
        out = tmp_path / "out"
        assert calls[0].startswith("nvidia-smi")
        assert calls[1] == f"python3 bench/bench_device.py --about --json {out}/environment.json require="
        assert re.fullmatch(r"python3 -m pytest -m gpu .*tests/test_gpu_loader\.py.* require=1", calls[2])
        for i, tool, program in ((3, "memcheck", "pipeline"), (5, "racecheck", "kernels"), (6, "initcheck", "kernels")):
            assert calls[i].startswith(f"compute-sanitizer --tool {tool} --error-exitcode 9")
            assert f"python3 bench/small_{program}.py" in calls[i]
        assert calls[4] == f"python3 bench/bench_device.py --json {out}/device.json require="
        assert len(calls) == 7
        last = (out / "run-on-gpu.log").read_text(encoding="utf-8").splitlines()[-1]
        assert last == "=== passed: nvidia-smi environment tests memcheck bench racecheck initcheck"

    def test_the_peers_run_where_they_are_named(self, stubs, tmp_path):
        done = subprocess.run([BENCH / "run_on_gpu.sh", "peers"], capture_output=True, encoding="utf-8", env=stubs())
        assert done.returncode == 0, done.stdout + done.stderr
        *_, call = (tmp_path / "calls").read_text(encoding="utf-8").splitlines()
        assert call.startswith("python3 -m gpuparse bench --device cuda --quick --part loader --part epoch ")
        assert call.endswith(f"--out {tmp_path}/out/peers require=")

    def test_a_part_that_fails_is_named_at_the_end(self, stubs):
        done = subprocess.run(
            [BENCH / "run_on_gpu.sh", "tests", "racecheck", "bench"], capture_output=True, encoding="utf-8",
            env=stubs(fail=('*"-m pytest"*', "*racecheck*")),
        )  # fmt: skip
        assert done.returncode == 1
        *_, passed, failed = done.stdout.splitlines()
        assert passed == "=== passed: bench"
        assert failed.strip() == "=== FAILED: tests (status 3); racecheck (status 3);"

    def test_what_cannot_be_imported_is_said_before_any_part(self, stubs, tmp_path):
        done = subprocess.run(
            [BENCH / "run_on_gpu.sh"], capture_output=True, encoding="utf-8", env=stubs(fail=("*gpuparse.loader*",))
        )
        assert done.returncode == 1
        assert "gpuparse cannot be imported" in done.stdout
        assert len((tmp_path / "calls").read_text(encoding="utf-8").splitlines()) == 1

    def test_peers_want_the_command_line(self, stubs, tmp_path):
        done = subprocess.run(
            [BENCH / "run_on_gpu.sh", "tests", "peers"], capture_output=True, encoding="utf-8",
            env=stubs(fail=('*"gpuparse --version"*',)),
        )  # fmt: skip
        assert done.returncode == 1
        assert "the command line cannot run, which peers needs" in done.stdout
        assert "pytest" not in (tmp_path / "calls").read_text(encoding="utf-8")

    def test_time_and_parts_are_limited(self, stubs):
        environment = {**stubs(), "LIMIT_SECONDS": "0"}
        done = subprocess.run(
            [BENCH / "run_on_gpu.sh", "bench"], capture_output=True, encoding="utf-8", env=environment
        )
        assert done.returncode == 1
        assert "=== FAILED: bench (no time left);" in done.stdout
        done = subprocess.run(
            [BENCH / "run_on_gpu.sh", "speed"], capture_output=True, encoding="utf-8", env=environment
        )
        assert done.returncode == 2
        assert "part is 'speed'; expected some of: environment tests memcheck" in done.stderr

    @pytest.mark.parametrize(("program", "what"), [("small_pipeline.py", "batch"), ("small_kernels.py", "result")])
    def test_the_short_runs_for_the_sanitizers_find_no_difference(self, program, what):
        command = [sys.executable, str(BENCH / program), "--device", "cpu"]
        done = subprocess.run(command, capture_output=True, encoding="utf-8")
        assert done.returncode == 0, done.stderr
        assert done.stdout.endswith(f"every {what} equals the CPU's\n")
