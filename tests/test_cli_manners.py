"""What all commands have in common: help, completion, JSON and quiet modes, progress bars, and quiet interrupts."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from typer.main import get_command
from typer.testing import CliRunner

import gpuparse
from gpuparse.cli import app
from gpuparse.cli.consoles import PlainConsole
from gpuparse.doctor import Check, Diagnosis

COMMANDS = sorted(get_command(app).commands)


def command(*arguments) -> list[str]:
    return [sys.executable, "-m", "gpuparse", *map(str, arguments)]


# Help and completion.


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example_and_the_exit_statuses(name):
    output = CliRunner(env={"COLUMNS": "200"}).invoke(app, [name, "--help"]).output
    assert f"Example: gpuparse {name}" in output
    assert "Exit status: 0 " in output
    assert "130 interrupted" in " ".join(output.split())


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_can_ask_for_completion(shell):
    words = {"bash": {"COMP_WORDS": "gpuparse do", "COMP_CWORD": "1"}}.get(shell, {})
    environment = {
        **os.environ,
        "_GPUPARSE_COMPLETE": f"complete_{shell}",
        "_TYPER_COMPLETE_ARGS": "gpuparse do",
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
        **words,
    }
    code = "import sys; sys.argv = ['gpuparse']; from gpuparse.__main__ import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, encoding="utf-8", check=False
    )
    assert "doctor" in done.stdout
    assert "convert" not in done.stdout


# JSON and quiet.

# What each command is given (the places are those of `small`), and a key of its JSON.
INVOCATIONS = {
    "bench": ("--toy --device cpu --cores 1 --part slices --against reference --out {new}", "parts"),
    "check": ("{data} --jobs 1", "findings"),
    "convert": ("{data} --out {new} --jobs 1", "datasets"),
    "demo": ("--out {new} --epochs 1", "contact_sheet"),
    "doctor": ("", "checks"),
    "evaluate": ("--pred {pred} --data {stores} --split train", "datasets"),
    "export": ("{stores}/DATA --format npz --out {new} --jobs 1", "cases"),
    "info": ("{stores}", "stores"),
    "preview": ("{stores} --out {new} --n 1", "samples"),
}


@pytest.fixture
def small(write_case, data_dir, tmp_path, sample_dir, monkeypatch):
    """A function that runs a command on one case: as a source, in a store, predicted; demo and doctor are short."""
    labels = np.random.default_rng(0).integers(0, 3, (3, 12, 10), np.uint8)
    write_case(labels * 60, labels)
    gpuparse.convert(data_dir, out_dir=tmp_path / "stores")
    (tmp_path / "pred/DATA").mkdir(parents=True)
    np.savez(tmp_path / "pred/DATA/case.npz", segs=labels)
    places = {"data": data_dir, **{name: tmp_path / name for name in ("stores", "pred", "new")}}
    monkeypatch.setattr("gpuparse.demo.make_sample_data", lambda folder: sample_dir)
    monkeypatch.setattr("gpuparse.doctor.diagnose", lambda *_: Diagnosis((Check("torch", "ok", "2.9"),)))

    def run(name, *options):
        arguments = INVOCATIONS[name][0].format(**places).split()
        result = CliRunner().invoke(app, [name, *arguments, *map(str, options)])
        assert result.exit_code == 0, result.output
        return result

    return run


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_prints_json_and_nothing_else(name, small, tmp_path):
    if name == "evaluate":  # writes it to a file, beside --csv and --plot
        small(name, "--json", tmp_path / "scores.json")
        found = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    else:
        found = json.loads(small(name, "--json").stdout)
    assert INVOCATIONS[name][1] in found


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_quiet_where_all_is_well(name, small, caplog):
    assert small(name, "--quiet").output == ""  # standard error is in it
    assert caplog.text == ""  # which would go there
    assert any({"--quiet", "-q"} == {*option.opts} for option in get_command(app).commands[name].params)


def test_the_demos_json_is_what_it_made(small, tmp_path):
    found = json.loads(small("demo", "--json", "--batch-size", 3, "--epochs", 2).stdout)
    for entry in found["datasets"]:
        store = gpuparse.open_store(entry["store_path"])
        assert (entry["num_slices"], entry["num_cases"]) == (len(store.slices), len(store.cases))
    assert {entry["name"] for entry in found["datasets"]} == {"SAMPLE_CT", "SAMPLE_CELLS"}
    assert found["batch_size"] == 3
    assert len(found["samples_per_second"]) == 2
    assert found["num_cores"] == len(os.sched_getaffinity(0))
    assert found["contact_sheet"] == str(tmp_path / "new/contact_sheet.png")


def test_the_benchs_json_is_its_results_file(small, tmp_path):
    result = small("bench", "--json")
    assert result.stdout == (tmp_path / "new/results.json").read_text(encoding="utf-8")
    assert all(re.match(r"\d\d:\d\d:\d\d \w+: ", line) for line in result.stderr.splitlines())


def test_convert_prints_json_and_nothing_else(sample_dir, tmp_path):
    arguments = ["convert", str(sample_dir), "--dataset", "SAMPLE_CT", "--out", str(tmp_path), "--jobs", "1", "--json"]
    result = CliRunner().invoke(app, arguments)
    found = json.loads(result.stdout)
    (entry,) = found["datasets"]
    assert (entry["name"], entry["num_cases"], entry["num_written"], entry["num_kept"]) == ("SAMPLE_CT", 4, 4, 0)
    assert entry["store_path"] == str(tmp_path / "SAMPLE_CT" / "train.zarr")
    assert entry["num_slices"] == len(gpuparse.open_store(entry["store_path"]).slices)
    assert (found["failures"], found["dry_run"]) == ([], False)
    planned = json.loads(CliRunner().invoke(app, [*arguments, "--dry-run"]).stdout)
    assert (planned["dry_run"], planned["datasets"][0]["num_kept"]) == (True, 4)


def test_failures_are_in_the_json_too(write_case, data_dir, tmp_path):
    bad = write_case(np.zeros((3, 8, 8)) - 1, name="bad")
    write_case(np.full((3, 8, 8), 7, np.uint8), name="good")
    result = CliRunner().invoke(
        app, ["convert", str(data_dir), "--out", str(tmp_path), "--jobs", "1", "--on-error", "skip", "--json"]
    )
    assert result.exit_code == 1
    (failure,) = json.loads(result.stdout)["failures"]
    assert failure["path"] == str(bad)
    assert "expected 0..255" in failure["reason"]


def test_check_is_quiet(write_case, data_dir):
    write_case(np.full((3, 8, 8), 7, np.uint8))
    result = CliRunner().invoke(app, ["check", str(data_dir), "--quiet", "--jobs", "1"])
    assert (result.exit_code in (0, 1), result.output) == (True, "")


# What is printed, and where it cannot be.

NAMES = ("c:x:2", "[red]x", "é", "肝")
PROMPT = "肝 :smile: [red]liver é"


@pytest.fixture
def strange_names(tmp_path):
    """Sources, predictions and a store whose names and prompts look like markup or are not Latin."""
    labels = np.zeros((4, 12, 12), np.uint8)
    labels[1:3, 2:7, 2:9] = 1
    for folder in ("data/A/train", "data/A/test", "pred"):
        (tmp_path / folder).mkdir(parents=True)
    for name in NAMES:
        for split in ("train", "test"):
            np.savez(tmp_path / f"data/A/{split}/{name}.npz", imgs=labels * 9, gts=labels, spacing=(0.7, 0.7, 3))
        np.savez(tmp_path / f"pred/{name}.npz", segs=labels)
    prompts = {"A": {"1": [PROMPT], "instance_label": 0}}
    (tmp_path / "data/class_prompts.json").write_text(json.dumps(prompts))
    gpuparse.convert(tmp_path / "data", out_dir=tmp_path / "stores")
    return tmp_path


# Commands that print these, in that folder.
PRINTING = {
    "check": ("check", "data", "--jobs", 1),
    "info": ("info", "stores"),
    "evaluate": ("evaluate", "--pred", "pred", "--data", "data", "--csv", "new.csv"),
}


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
@pytest.mark.parametrize("name", ["check", "info", "evaluate"])
def test_names_and_prompts_are_printed_as_they_are_or_escaped(strange_names, name, encoding):
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "COLUMNS": "200", "NO_COLOR": "1"}
    arguments = command(*PRINTING[name])
    done = subprocess.run(arguments, cwd=strange_names, env=environment, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    shown = done.stdout.decode(encoding)
    for text in [f"{case}.npz" for case in NAMES] if name == "check" else [PROMPT]:
        assert text.encode(encoding, "backslashreplace").decode(encoding) in shown
    if encoding != "utf-8":
        tables = [line for line in shown.splitlines() if line.startswith(("|", "+"))]
        widths = [len(line) for line in tables]
        assert len(set(widths)) <= (2 if name == "info" else 1)  # of tables
        assert len(tables) > 3
    if name == "evaluate":
        assert f"1.0000 {'+-' if encoding == 'ascii' else '±'} 0.0000" in shown
        assert (strange_names / "new.csv").is_file()


def test_names_that_are_no_unicode_are_printed_with_escapes():
    console = PlainConsole(file=io.TextIOWrapper(io.BytesIO(), "utf-8"), width=80)
    console.print("a\udcff:smile:[b]", end="")
    console.file.seek(0)
    assert console.file.read() == r"a\udcff:smile:[b]"
    assert console.can_show("é")
    assert not PlainConsole(file=io.TextIOWrapper(io.BytesIO(), "ascii")).can_show("é")


def test_every_console_of_the_commands_is_a_plain_one():
    folder = Path(gpuparse.__file__).parent / "cli"
    made = [path.name for path in folder.glob("*.py") if re.search(r"\bConsole\(", path.read_text(encoding="utf-8"))]
    assert made == []


FULL = "error: standard output cannot be written: [Errno 28] No space left on device. Send it to a place that takes it."


@pytest.mark.parametrize("name", ["check", "info", "evaluate", "json", "version", "help"])
def test_a_full_disk_behind_standard_output_is_one_line_and_a_closed_pipe_is_none(strange_names, name):
    others = {"json": ("info", "stores", "--json"), "version": ("--version",), "help": ("check", "--help")}
    arguments = command(*{**PRINTING, **others}[name])

    def run(output):
        done = subprocess.run(
            arguments, cwd=strange_names, stdout=output, stderr=subprocess.PIPE, encoding="utf-8", check=False
        )
        return done.returncode, done.stderr.splitlines()

    with Path("/dev/full").open("wb") as full:
        assert run(full) == (2, [FULL])
    assert (strange_names / "new.csv").is_file() == (name == "evaluate")
    ours, theirs = os.pipe()
    os.close(ours)
    assert run(theirs) == (1, [])
    os.close(theirs)


def run_failing(raised):
    """A command that ends with an error which is none of the package's own."""
    code = (
        "import sys, gpuparse.cli\n"
        "def fail(*_, **__):\n"
        f"    raise {raised}\n"
        "import gpuparse.info\n"
        "sys.modules['gpuparse.info'].info = fail\n"
        "sys.argv = ['gpuparse', 'info', 'x']\n"
        "gpuparse.cli.main()"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=False)


def test_an_error_of_another_file_than_standard_output_is_not_taken_for_it():
    done = run_failing("OSError(28, 'No space left on device')")
    assert done.returncode == 1
    assert "standard output" not in done.stderr
    assert done.stderr.splitlines()[-1] == "OSError: [Errno 28] No space left on device"


@pytest.mark.parametrize(
    ("raised", "status", "last"),
    [
        (
            'RuntimeError("can\'t start new thread")',
            2,
            "error: can't start new thread. This user or container has as many threads and",
        ),
        ("OSError(24, 'Too many open files')", 2, "error: [Errno 24] Too many open files. This process has as many"),
        ("RuntimeError('another one')", 1, "RuntimeError: another one"),
    ],
)
def test_a_limit_that_any_library_meets_is_one_line(raised, status, last):
    done = run_failing(raised)
    lines = done.stderr.splitlines()
    assert done.returncode == status
    assert lines[-1].startswith(last)
    assert len(lines) == 1 or status == 1


# Progress bars.


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_for_terminals_alone(sample_stores, tmp_path, terminal):
    arguments = command("export", sample_stores["SAMPLE_CT"], "--format", "npz", "--out", tmp_path, "--jobs", 1)
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120"}
    if not terminal:
        done = subprocess.run(arguments, env=environment, capture_output=True, encoding="utf-8", check=True)
        assert "\x1b" not in done.stdout + done.stderr
        assert "━" not in done.stdout
        assert done.stdout.splitlines() == ["SAMPLE_CT: 4 cases", str(tmp_path / "SAMPLE_CT" / "train")]
        return
    ours, theirs = pty.openpty()
    process = subprocess.Popen(arguments, env=environment, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 65536):
            shown += part
    except OSError:  # the other side is closed
        pass
    os.close(ours)
    assert process.wait() == 0
    assert "━" in shown.decode()
    assert "4/4" in shown.decode()


# Interrupts.


@pytest.fixture(scope="module")
def many_cases(tmp_path_factory):
    """Enough to convert for a few seconds."""
    folder = tmp_path_factory.mktemp("many")
    (folder / "MANY/train").mkdir(parents=True)
    (folder / "class_prompts.json").write_text(json.dumps({"MANY": {"1": ["x"], "instance_label": 0}}))
    random = np.random.default_rng(0)
    for number in range(40):
        image = random.integers(0, 256, (40, 128, 128), np.uint8)
        np.savez(folder / f"MANY/train/case{number:02d}.npz", imgs=image, gts=image // 128, spacing=(1.0, 1.0, 5.0))
    return folder


def children_of(pid: int) -> list[int]:
    """Processes whose parent is `pid`, the dead ones left out."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                state, parent = (folder / "stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[:2]
            except OSError:
                continue
            if int(parent) == pid and state != "Z":
                found.append(int(folder.name))
    return found


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def interrupt(arguments, ready):
    """Interrupts a command's process group, as Ctrl-C does: its status, standard error, children that are left."""
    process = subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", start_new_session=True
    )
    deadline = time.monotonic() + 60
    while not ready(process.pid):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    children = children_of(process.pid)
    os.killpg(process.pid, signal.SIGINT)
    _, messages = process.communicate(timeout=60)
    for _ in range(100):
        if not any(map(is_running, children)):
            break
        time.sleep(0.02)
    return process.returncode, messages, [pid for pid in children if is_running(pid)]


@pytest.mark.parametrize("moment", ["workers start", "cases are written"])
def test_an_interrupted_conversion_leaves_no_store_and_no_process(many_cases, tmp_path, moment):
    def ready(pid):
        if moment == "workers start":
            return len(children_of(pid)) == 2
        return len(list(tmp_path.glob("MANY/.train.zarr.partial/cases/*"))) >= 3

    arguments = command("convert", many_cases, "--out", tmp_path, "--jobs", 2)
    status, messages, left = interrupt(arguments, ready)
    assert (status, messages.strip(), left) == (130, "interrupted", [])
    assert not (tmp_path / "MANY" / "train.zarr").exists()
    # And the next run goes on: same store as if nothing had been.
    report = gpuparse.convert(many_cases, out_dir=tmp_path)
    assert report.datasets[0].num_cases == 40
    assert (report.datasets[0].num_kept >= 3) == (moment == "cases are written")
    assert not (tmp_path / "MANY" / ".train.zarr.partial").exists()


def test_an_interrupted_export_is_quiet_too(many_cases, tmp_path):
    gpuparse.convert(many_cases, out_dir=tmp_path)
    arguments = command("export", tmp_path / "MANY", "--format", "png", "--jobs", 2)
    status, messages, left = interrupt(
        arguments, lambda _: any(tmp_path.glob("MANY/.processed-train.partial/processed/train/*.png"))
    )
    assert (status, messages.strip(), left) == (130, "interrupted", [])
    assert not (tmp_path / "MANY" / "processed").exists()


def test_doctor_and_check_are_quiet_too(many_cases):
    for arguments in (command("doctor"), command("check", many_cases, "--jobs", 2)):
        status, messages, left = interrupt(arguments, lambda pid: len(children_of(pid)) >= 2)
        assert (status, messages.strip(), left) == (130, "interrupted", [])


def test_an_interrupt_while_modules_are_imported_is_quiet():
    """Python itself ends by the signal where it met it inside `exec`; a shell shows 130 for both."""
    code = (
        "import os, signal, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'gpuparse.cli.convert':\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from gpuparse.__main__ import main\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=False)
    assert done.returncode in (130, -signal.SIGINT)
    assert done.stderr.strip() == "interrupted"
