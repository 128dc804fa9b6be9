# What developers and CI run. `just` alone lists the recipes. The tools come with `pip install -e ".[cuda12,test,dev]"`.

kernel_sources := "kernels/*.cu kernels/*.h kernels/*.cpp"

[private]
default:
    @just --list --unsorted

# everything CI checks in a checkout that is installed already
check: lint types test

# style of Python, kernels, scripts and the Dockerfile; changes nothing
lint:
    ruff check .
    ruff format --check .
    clang-format --dry-run -Werror {{ kernel_sources }}
    bash -n .ci/run
    bash -n tests/olympus/make_environment.sh
    hadolint docker/Dockerfile

# rewrite the files in the project's style
format:
    ruff check --fix .
    ruff format .
    clang-format -i {{ kernel_sources }}

# static types
types:
    mypy

# tests and doctests; arguments go to pytest: just test -k store
test *args:
    python -m pytest {{ args }}

# the environment of BiomedParse's finetuning framework, for the test marked `olympus`; 3.6 GB, kept for later
olympus:
    tests/olympus/make_environment.sh

# all tests under Python 3.11 and 3.12 (or the interpreters named), each with numpy 2 and with numpy 1.26
matrix +pythons="python3.11 python3.12":
    #!/usr/bin/env bash
    set -euo pipefail
    work=$(mktemp -d "${TMPDIR:-/tmp}/gpuparse-matrix.XXXXXX")
    trap 'rm -rf -- "$work"' EXIT
    for python in {{ pythons }}; do
      for versions in constraints.txt tests/olympus/constraints.txt; do
        printf '\n=== %s, %s\n' "$python" "$versions"
        rm -rf -- "$work/venv"
        "$python" -m venv "$work/venv"
        "$work/venv/bin/python" -m pip install --quiet -c "$versions" -e ".[cuda12,test]"
        "$work/venv/bin/python" -m pytest
      done
    done

# the documentation site, in site/; a warning is an error
docs:
    NO_MKDOCS_2_WARNING=1 mkdocs build --strict

# sample data, conversion and batches in ./gpuparse-demo
demo:
    python -m gpuparse demo

# what CI runs: README's commands in a new environment, `lint` and `types`, and the tests with numpy 1.26
ci:
    .ci/run
