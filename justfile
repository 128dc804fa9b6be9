# What developers and CI run. `just` alone lists the recipes. The tools come with `pip install -e ".[cuda12,test,dev]"`.

kernel_sources := "kernels/*.cu kernels/*.h kernels/*.cpp"

[private]
default:
    @just --list --unsorted

# everything CI checks in a checkout that is installed already
check: lint types test

# style of Python, kernels and scripts; changes nothing
lint:
    ruff check .
    ruff format --check .
    clang-format --dry-run -Werror {{ kernel_sources }}
    bash -n .ci/run

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

# sample data, conversion and batches in ./gpuparse-demo
demo:
    python -m gpuparse demo

# what CI runs: README's commands in a new environment, and `lint` and `types`
ci:
    .ci/run
