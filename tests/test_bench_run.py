"""`gpuparse bench` at toy size: every part runs, its figures fit each other, the page comes from the JSON alone."""

from __future__ import annotations

import contextlib
import copy
import html.parser
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from oracle import HAS_IPP
from rich.console import Console
from typer.testing import CliRunner

from gpuparse.bench import page, plots, tables
from gpuparse.bench.context import Context, NotRunError
from gpuparse.bench.data import prepare
from gpuparse.bench.machine import describe_gpu
from gpuparse.bench.measuring import ratio_of_medians, summary
from gpuparse.bench.parts import conversion, kernels, memory
from gpuparse.bench.run import PARTS, BenchRequest, check_parts, load_results, run_bench
from gpuparse.bench.settings import BenchSettings
from gpuparse.cli import app
from gpuparse.cli import bench as bench_cli
from gpuparse.errors import InputError

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import plot_results

cv2 = pytest.importorskip("cv2")


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """(folder, results) of a run of all parts against the reference, on one core."""
    out = tmp_path_factory.mktemp("bench") / "new"
    command = [sys.executable, "-m", "gpuparse", "bench", "--toy", "--device", "cpu", "--cores", "1"]
    done = subprocess.run([*command, "--against", "reference", "--out", out], capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert re.search(r"^\d\d:\d\d:\d\d loader: round 1 of ", done.stderr, re.MULTILINE)
    for word in ("Loaders by themselves", "ahead", "Targets", "per 1000 batches", "raw npz"):
        assert word in done.stdout
    return out, json.loads((out / "results.json").read_text(encoding="utf-8"))


def test_every_part_has_run(toy):
    _, result = toy
    assert list(result["parts"]) == list(PARTS)
    for name, part in result["parts"].items():
        assert not {"failed", "not_run"} & part.keys(), (name, part)
        assert part.get("left_out", {}) == {}
    assert result["machine"].keys() >= {"cpu", "cores", "commit", "versions", "load_average_at_start", "command"}
    assert "bench --toy --device cpu --cores 1 --against reference" in result["machine"]["command"]
    assert result["settings"]["level"] == "toy"
    assert len(result["settings"]["cores"]) == 1
    assert result["data"] == {**result["data"], "generated": True, "datasets": ["SMALL"], "volumes": 2}
    assert result["data"]["slices"] == 6 + 20 + 22 + 21


def test_the_loaders_figures_fit_each_other(toy):
    part = toy[1]["parts"]["loader"]
    ours, reference = part["sides"]["gpuparse"], part["sides"]["reference"]
    for side in (ours, reference):
        assert side["check"]["passed"] is True
        assert side["check"]["largest_difference"] <= (not HAS_IPP)
        assert side["check"]["mask_share_equal"] == 1
        rates = side["samples_per_second"]
        assert len(rates["rounds"]) == 2
        assert rates["median_95"][0] <= rates["median"] <= rates["median_95"][1]
    assert ours["stage_ms_per_batch"].keys() >= {"plan", "read", "decode", "encode", "augment", "wait"}
    ratio = part["ratios"]["reference"]
    medians = [side["samples_per_second"]["median"] for side in (ours, reference)]
    assert ratio["ratio"] == pytest.approx(medians[0] / medians[1])
    assert ratio["ratio_95"][0] <= ratio["ratio"] <= ratio["ratio_95"][1]


def test_times_of_a_first_batch_add_up(toy):
    part = toy[1]["parts"]["first-batch"]
    assert part["raw-large"]["sides"].keys() == {"gpuparse", "reference"}
    assert part["raw"]["raw_bytes"] == part["raw-large"]["raw_bytes"] > 0  # toy: the volumes as they are
    for kind in ("prepared", "raw", "raw-large"):
        for side in part[kind]["sides"].values():
            after = side["make_seconds"]["median"] + side["batch_seconds"]["median"]
            assert side["after_imports_seconds"]["median"] == pytest.approx(after)
            assert side["process_seconds"]["median"] > after + side["import_seconds"]["median"]
        sides = part[kind]["sides"]
        theirs, mine = (sides[name]["process_seconds"]["median"] for name in ("reference", "gpuparse"))
        assert part[kind]["ratios"]["reference"]["ratio"] == pytest.approx(theirs / mine)


def test_the_other_parts_measure_what_they_say(toy):
    parts = toy[1]["parts"]
    step = parts["epoch"]["sides"]["gpuparse"]["seconds_per_step"]
    ratio = parts["epoch"]["sides"]["gpuparse"]["loader_over_held"]["ratio"]
    assert ratio == pytest.approx(step["loader"]["median"] / step["held"]["median"])
    ways = parts["convert"]["ways"]
    assert list(ways) == ["gpuparse", "gpuparse, level high", "reference"]
    assert ways["gpuparse, level high"]["disk_bytes"] < ways["reference"]["disk_bytes"]
    assert parts["scaling"]["cores"] == [1]
    assert parts["scaling"]["sides"].keys() == {"gpuparse", "reference"}
    assert [entry["num_slices"] for entry in parts["slices"]["lengths"]] == [100, 1000]
    assert all(place["same_batch"] for place in parts["resume"]["places"])
    assert [place["batches_before"] for place in parts["resume"]["places"]] == [0, 17, 31]
    assert parts["resume"]["reference"]["batches_before"] == 3
    access = parts["access"]["slices"]
    assert len(access) == 4 * 3
    one = next(e for e in access if e["chunks"] == "slices along z" and e["axis"] == 0)
    across = next(e for e in access if e["chunks"] == "slices along z" and e["axis"] == 2)
    assert one["chunks_per_slice"] <= 4  # three planes and a mask
    assert across["chunks_per_slice"] > 44  # every slice of the volume
    assert parts["memory"]["batches"] == list(range(1, 21))


class _Links(html.parser.HTMLParser):
    """Whatever a page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag, attributes):
        self.found += [v for k, v in attributes if k in ("src", "href", "srcset", "data") and not v.startswith("#")]
        if tag not in ("meta", "link", "br", "img"):
            self.open.append(tag)
        assert tag not in ("script", "link", "img", "iframe")

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_needs_nothing_else_and_has_every_part(toy):
    out, result = toy
    text = (out / "results.html").read_text(encoding="utf-8")
    links = _Links()
    links.feed(text)
    assert links.found == []
    assert links.open == []
    assert "url(" not in re.sub(r"url\(#", "", text)
    assert text.count("<svg") == len(plots.PLOTS)
    for title in ("Targets", "Loaders by themselves", "Time to the first batch", "Random access", "Memory"):
        assert f"<h2>{title}</h2>" in text
    median = result["parts"]["loader"]["sides"]["reference"]["samples_per_second"]["median"]
    assert f"{median:.1f}" in text
    assert "A toy run" in text
    for name in plots.PLOTS:
        picture = cv2.imread(str(out / f"{name}.png"))
        assert picture.shape[1] > 600
        assert picture.std() > 5  # not blank


def test_tables_and_page_are_made_again_from_the_results_alone(toy, tmp_path):
    out, _ = toy
    done = CliRunner().invoke(app, ["bench", "--from", str(out / "results.json"), "--out", str(tmp_path / "again")])
    assert done.exit_code == 0, done.output
    assert "Loaders by themselves" in done.output
    again = tmp_path / "again"
    assert (again / "results.html").read_text(encoding="utf-8") == (out / "results.html").read_text(encoding="utf-8")
    assert {path.name for path in again.iterdir()} == {path.name for path in out.iterdir()} - {"results.json"}


class TestDocuments:
    """README's table and plots are made from results by bench/plot_results.py."""

    def test_of_a_run(self, toy, tmp_path, capsys):
        results, readme = toy[0] / "results.json", tmp_path / "README.md"
        readme.write_text("before\n<!-- bench -->\nold\n<!-- /bench -->\nafter\n")
        places = {"--images": tmp_path / "images", "--readme": readme, "--figures": tmp_path / "figures.md"}
        arguments = [str(word) for place in places.items() for word in place]
        plot_results.main([str(results), *arguments])
        for name in plot_results.README_PLOTS:
            assert cv2.imread(str(tmp_path / f"images/bench-{name}.png")).std() > 5
        text = readme.read_text(encoding="utf-8")
        assert text.startswith("before\n<!-- bench -->\n")
        assert text.endswith("\n<!-- /bench -->\nafter\n")
        side = toy[1]["parts"]["loader"]["sides"]["gpuparse"]
        assert f"| **gpuparse** | {side['samples_per_second']['median']:.0f} (" in text
        assert "old" not in text
        shown = (tmp_path / "figures.md").read_text(encoding="utf-8")
        for name in plots.PLOTS:
            assert f"](images/bench-{name}.png)" in shown
            assert (tmp_path / f"images/bench-{name}.png").exists()
        for title, _ in page.SECTIONS.values():
            assert f"\n## {title}\n" in shown
        for name, part in toy[1]["parts"].items():
            for table in tables.part_tables(name, part):
                for row in tables.cells(table)[1]:
                    assert f"| {' | '.join(row)} |" in shown
        assert "Samples/s by cores:\n\n| side | 1 |\n|---|---|\n| gpuparse | " in shown
        content = json.loads(results.read_text(encoding="utf-8"))
        content["parts"]["loader"] = {"not_run": "no reason"}
        (tmp_path / "results.json").write_text(json.dumps(content))
        with pytest.raises(SystemExit):
            plot_results.main([str(tmp_path / "results.json"), *arguments])
        assert "has no figures for loader; expected a run of these parts" in capsys.readouterr().err
        readme.write_text("no marks")
        with pytest.raises(SystemExit, match=r"README\.md has 0 places"):
            plot_results.main([str(results), *arguments])

    def test_readme_shows_the_figures_that_are_kept(self):
        root = Path(__file__).parents[1]
        text, kept = (root / "README.md").read_text(encoding="utf-8"), root / "bench/results/bench-cpu.json"
        assert len(plot_results.MARKS.findall(text)) == 1
        if kept.exists():
            assert plot_results.fill(text, load_results(kept)) == text
            assert plot_results.figures(load_results(kept)) == (root / "docs/figures.md").read_text(encoding="utf-8")


def test_a_part_that_fails_or_cannot_run_does_not_stop_the_others(monkeypatch, tmp_path):
    def fail(_):
        raise RuntimeError("made to fail")

    def refuse(_):
        raise NotRunError("needs another machine")

    monkeypatch.setattr(memory, "measure", fail)
    monkeypatch.setattr(kernels, "measure", refuse)
    told = []
    request = BenchRequest(None, BenchSettings.choose("toy", "cpu"), (), check_parts(["memory", "kernels", "slices"]),
                           None, ("gpuparse", "bench"))  # fmt: skip
    result = run_bench(request, tmp_path, lambda part, what: told.append(part))
    assert result["parts"]["memory"]["failed"] == "RuntimeError: made to fail"
    assert result["parts"]["kernels"]["not_run"] == "needs another machine"
    assert "lengths" in result["parts"]["slices"]
    assert set(told) == {"data", "slices"}
    page.write_page(result, tmp_path)
    text = (tmp_path / "results.html").read_text(encoding="utf-8")
    assert "made to fail" in text
    assert "needs another machine" in text
    assert plots.draw("memory", result) is None
    console = Console(record=True, width=120)
    tables.print_results(console, result)
    assert "memory: RuntimeError: made to fail" in console.export_text()
    path = tmp_path / "results.json"
    done = CliRunner().invoke(app, ["bench", "--from", str(path), "--out", str(tmp_path)])
    assert done.exit_code == 1


@pytest.mark.parametrize("option", ["--json", "--quiet"])
def test_what_failed_is_said_on_standard_error(toy, tmp_path, option):
    result = copy.deepcopy(toy[1])
    result["parts"]["memory"] = {"failed": "RuntimeError: [made] to fail"}
    result["parts"]["epoch"]["left_out"] = {"gpuparse": "failed: no reason"}
    path = tmp_path / "results.json"
    path.write_text(json.dumps(result))
    done = CliRunner().invoke(app, ["bench", "--from", str(path), "--out", str(tmp_path), option])
    assert done.exit_code == 1
    lines = ["epoch: failed: no reason", "memory: RuntimeError: [made] to fail"]
    assert done.stderr.splitlines() == lines
    assert done.stdout == "" if option == "--quiet" else json.loads(done.stdout) == result


@pytest.mark.parametrize("number", ["inf", "nan", "1e300", "100001", "-1"])
def test_raw_files_that_no_disk_has_room_for(number, tmp_path):
    done = CliRunner().invoke(app, ["bench", "--raw-gb", number, "--out", str(tmp_path / "out"), "--device", "cpu"])
    with pytest.raises(InputError, match=r"^--raw-gb is \S+; expected 0 to 100000\.$"):
        raise done.exception
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kept", [(), ("reference",), ("gpuparse",)])
def test_sides_that_failed_leave_their_figures_out_and_the_page_stands(toy, tmp_path, kept):
    result = copy.deepcopy(toy[1])
    for part in result["parts"].values():
        for entry in (part, *(value for value in part.values() if isinstance(value, dict))):
            if "sides" in entry:
                entry["sides"] = {name: side for name, side in entry["sides"].items() if name in kept}
                entry["ratios"] = {}
                part["left_out"] = dict.fromkeys({"gpuparse", "reference"} - {*kept}, "failed: no reason")
    path = tmp_path / "results.json"
    path.write_text(json.dumps(result))
    done = CliRunner().invoke(app, ["bench", "--from", str(path), "--out", str(tmp_path)])
    assert done.exit_code == ("gpuparse" not in kept), done.output
    assert ("loader, left out: gpuparse: failed: no reason" in done.output) == ("gpuparse" not in kept)
    text = (tmp_path / "results.html").read_text(encoding="utf-8")
    assert ("Left out: reference: failed: no reason" in text) == ("reference" not in kept)
    of_sides = {"loader", "cpu", "first-batch-prepared", "first-batch-raw", "first-batch-raw-large", "epoch", "scaling"}
    assert {name for name in plots.PLOTS if plots.draw(name, result) is None} == (set() if kept else of_sides)


def test_processes_that_fail_are_not_taken_for_measurements(monkeypatch):
    with prepare(None, small=True) as data:
        context = Context(data, BenchSettings.choose("toy", "cpu"), (), lambda _: None)
        monkeypatch.setattr(sys, "executable", "/bin/false")
        with pytest.raises(NotRunError, match="gpuparse failed: "):
            conversion.measure(context)
        with pytest.raises(NotRunError, match="it failed: "):
            kernels.measure(context)
        monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
        with pytest.raises(NotRunError, match=r"OpenCV \(cv2\) is not installed"):
            kernels.measure(context)


@pytest.mark.parametrize(("signal_number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_run_that_is_ended_leaves_no_files_and_no_processes(tmp_path, signal_number, status):
    """What a cluster sends when a job's time is over: the sides' files may be gigabytes."""
    work, out = tmp_path / "work", tmp_path / "out"
    work.mkdir()
    command = [sys.executable, "-m", "gpuparse", "bench", "--toy", "--device", "cpu", "--part", "loader",
               "--against", "reference", "--work-dir", work, "--out", out]  # fmt: skip
    run = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def workers():
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                parent = int(path.read_text(encoding="utf-8").rpartition(")")[2].split()[1])
                if parent == run.pid and b"gpuparse.bench.worker" in (path.parent / "cmdline").read_bytes():
                    found.append(path)
        return found

    end = time.monotonic() + 120
    while not workers():
        assert run.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)
    found = workers()
    assert list(work.iterdir())
    run.send_signal(signal_number)
    assert run.wait(60) == status
    assert list(work.iterdir()) == []
    end = time.monotonic() + 20
    while any(path.exists() for path in found):
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_gpu_is_described_with_its_driver(monkeypatch, tmp_path):
    properties = SimpleNamespace(name="A GPU", total_memory=2**34, multi_processor_count=132, L2_cache_size=50 << 20)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: properties)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert describe_gpu()["driver"] == "unknown"
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 580.1\necho 580.1\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    about = describe_gpu()
    assert (about["gpu"], about["multiprocessors"], about["l2_bytes"]) == ("A GPU", 132, 50 << 20)
    assert about["driver"] == "580.1"


def test_summaries_hold_their_medians():
    found = summary([3, 1, 2, 9])
    assert found["median"] == 2.5
    assert found["median_95"][0] <= 2.5 <= found["median_95"][1]
    assert found["range"] == [1, 9]
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(60):
        low, high = summary(random.exponential(1, 25))["median_95"]
        covered += low <= np.log(2) <= high
    assert covered >= 50
    assert ratio_of_medians([2, 4, 6], [1, 2, 3]) == {"ratio": 2, "ratio_95": [2, 2], "num_rounds": 3}


class TestRefusals:
    """Arguments that cannot be used."""

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--against", "reference,nothing"], "--against is 'reference,nothing'; expected some of reference, "),
            (["--against", ","], "--against is ','; expected some of"),
            (["--part", "speed"], "--part is 'speed'; expected one of loader, first-batch, "),
            (["--device", "tpu"], "--device is 'tpu'; expected cpu, cuda or auto"),
            (["--device", "cuda"], "--device is cuda, and torch finds no GPU. Take --device cpu"),
            (["--device", "cpu", "--cores", "4000"], "--cores is 4000; expected 1 to "),
            (
                ["--device", "cpu", "--data", "/nowhere"],
                "--data is /nowhere; expected a folder with class_prompts",
            ),
            (
                ["--device", "cpu", "--original", "/nowhere"],
                "--original is /nowhere; expected a checkout of Biomed",
            ),
            (["--from", "/nowhere/results.json"], "/nowhere/results.json holds no results"),
        ],
    )
    def test_of_the_command(self, arguments, message, monkeypatch, tmp_path):
        import torch

        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        done = CliRunner().invoke(app, ["bench", "--toy", "--out", str(tmp_path), *arguments])
        assert done.exit_code == 1
        assert isinstance(done.exception, InputError)
        assert message in str(done.exception)

    def test_results_of_another_version(self, tmp_path):
        (tmp_path / "results.json").write_text('{"results_version": 0}')
        with pytest.raises(InputError, match="has results_version 0; this gpuparse reads 2"):
            load_results(tmp_path / "results.json")

    def test_folders_that_cannot_be_written(self, tmp_path, toy):
        (tmp_path / "file").touch()
        request = BenchRequest(None, BenchSettings.choose("toy", "cpu"), (), (), None, ())
        with pytest.raises(InputError, match=r"--out .*file/out cannot be made"):
            run_bench(request, tmp_path / "file/out")
        with pytest.raises(InputError, match="the page cannot be written"):
            page.write_page(toy[1], tmp_path / "file/out")

    def test_data_whose_prompts_begin_with_a_byte_order_mark(self, write_case, data_dir):
        labels = np.zeros((4, 20, 20), np.uint8)
        labels[1:3, 3:9, 4:9] = 2
        write_case(np.full((4, 20, 20), 9, np.uint8), labels, prompts={"2": "die Füße"})
        prompts = data_dir / "class_prompts.json"
        prompts.write_text(prompts.read_text(encoding="utf-8"), encoding="utf-8-sig")
        with prepare(data_dir) as data:
            assert data.prompts == {"DATA": {2: ["die Füße"]}}
            assert {folder.parent.name for folder in data.png_folders(16)} == {"DATA"}

    def test_data_of_instances_alone(self, write_case, data_dir):
        labels = np.zeros((4, 20, 20), np.uint8)
        labels[1:3, 3:9, 4:9] = 2
        write_case(np.full((4, 20, 20), 9, np.uint8), labels, instance_label=1)
        with pytest.raises(InputError, match="holds no dataset whose ids are classes"), prepare(data_dir):
            pass


def test_a_device_is_chosen_by_what_gpuparse_can_use(monkeypatch):
    """torch may find a GPU that CuPy was not built for."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for kind in ("cpu", "cuda"):
        monkeypatch.setattr("gpuparse.device.choose_device", lambda device, kind=kind: SimpleNamespace(type=kind))
        assert bench_cli._device("auto") == kind
    assert (bench_cli._device("cpu"), bench_cli._device("cuda")) == ("cpu", "cuda")


def test_results_of_a_gpu_say_so_and_show_short_steps(toy, tmp_path):
    _, result = toy
    on_gpu = copy.deepcopy(result)
    on_gpu["machine"]["gpu"] = "NVIDIA H100 80GB HBM3"
    for side in on_gpu["parts"]["epoch"]["sides"].values():
        side["seconds_per_step"]["loader"] |= {"median": 0.00512, "median_95": [0.00501, 0.0053]}
    console = Console(record=True, width=200)
    tables.print_results(console, on_gpu)
    printed = console.export_text()
    assert f"NVIDIA H100 80GB HBM3, {result['machine']['cpu']}, 1 cores per side" in printed
    assert "5.12 (5.01 to 5.30)" in printed
    written = page.write_page(on_gpu, tmp_path)[0].read_text(encoding="utf-8")
    assert "<p>NVIDIA H100 80GB HBM3, " in written
    assert "5.12 (5.01 to 5.30)" in written
