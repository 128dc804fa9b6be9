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

# all tests under Python 3.11 to 3.13 (or the interpreters named), each with numpy 2 and with numpy 1.26
matrix +pythons="python3.11 python3.12 python3.13":
    #!/usr/bin/env bash
    set -euo pipefail
    work=$(mktemp -d "${TMPDIR:-/tmp}/gpuparse-matrix.XXXXXX")
    trap 'rm -rf -- "$work"' EXIT
    for python in {{ pythons }}; do
      for versions in constraints.txt tests/olympus/constraints.txt; do
        if [[ $versions != constraints.txt ]] && "$python" -c 'import sys; sys.exit(sys.version_info < (3, 13))'; then
          continue  # numpy 1.26 ends with Python 3.12
        fi
        printf '\n=== %s, %s\n' "$python" "$versions"
        rm -rf -- "$work/venv"
        "$python" -m venv "$work/venv"
        "$work/venv/bin/python" -m pip install --quiet -c "$versions" -e ".[cuda12,test]"
        "$work/venv/bin/python" -m pytest
      done
    done

# all tests with the least versions that pyproject.toml allows of what it names
floors python="python3.11":
    #!/usr/bin/env bash
    set -euo pipefail
    work=$(mktemp -d "${TMPDIR:-/tmp}/gpuparse-floors.XXXXXX")
    trap 'rm -rf -- "$work"' EXIT
    "{{ python }}" -m venv "$work/venv"
    python="$work/venv/bin/python"
    "$python" -m pip install --quiet uv
    "$python" -m uv pip compile --quiet --resolution lowest-direct --extra cuda12 --extra test \
      --output-file "$work/floors.txt" pyproject.toml
    "$python" -m pip install --quiet -c "$work/floors.txt" -e ".[cuda12,test]"
    PATH="$work/venv/bin:$PATH" "$python" -m pytest -n 2 --dist loadfile

# the tests of the CPU kernels with these built for g++'s sanitizers: `just sanitize`, `just sanitize thread`
sanitize kind="address,undefined":
    #!/usr/bin/env bash
    set -euo pipefail
    work=$(mktemp -d "${TMPDIR:-/tmp}/gpuparse-sanitize.XXXXXX")
    trap 'rm -rf -- "$work"' EXIT
    python -m pip install --quiet --no-deps --target "$work" . \
      -C "cmake.define.CMAKE_CXX_FLAGS=-g -fno-omit-frame-pointer -fsanitize={{ kind }}"
    case "{{ kind }}" in thread) libraries="libtsan.so" ;; *) libraries="libasan.so libubsan.so libstdc++.so" ;; esac
    preload=$(for library in $libraries; do g++ -print-file-name="$library"; done | tr '\n' ' ')
    # The modules of an editable install come before the path: they go. Forking is beyond the thread sanitizer.
    code="import sys; sys.meta_path[:] = [f for f in sys.meta_path if not type(f).__module__.startswith('_editable')]"
    code+="; import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    cd -- "$(mktemp -d "$work/run.XXXXXX")"
    tests={{ justfile_directory() }}/tests
    PYTHONPATH="$work" LD_PRELOAD="$preload" ASAN_OPTIONS=detect_leaks=0:handle_segv=0 \
      UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 TSAN_OPTIONS=halt_on_error=1:die_after_fork=0:ignore_noninstrumented_modules=1 \
      python -c "$code" -q -p no:cacheprovider --rootdir {{ justfile_directory() }} -k "not fork and not worker and not one_by_one and not environment" \
      "$tests"/test_{native_read,read,read_damage,gather,presence,random,encode,prepare,foreground,loader,cache,parallel}.py \
      "$tests"/test_augment*.py

# the documentation site, in site/; a warning is an error
docs:
    NO_MKDOCS_2_WARNING=1 mkdocs build --strict

# sample data, conversion and batches in ./gpuparse-demo
demo:
    python -m gpuparse demo

# what CI runs: README's commands in a new environment, `lint` and `types`, and the tests with numpy 1.26
ci:
    .ci/run
