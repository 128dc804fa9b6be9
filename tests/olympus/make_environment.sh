#!/usr/bin/env bash
# Makes the environment in which tests/olympus runs: BiomedParse's finetuning framework from PyPI and what gpuparse
# needs, but not gpuparse itself. Prints its folder on standard output; everything else goes to standard error.
#
#   make_environment.sh          makes it, unless it is there
#   make_environment.sh --where  only says where it is, or would be
#
# It lies in GPUPARSE_OLYMPUS_ENV (default: ~/.cache/gpuparse/olympus), in a folder named after the digest of this
# script and of constraints.txt: other versions make another environment, and continuous integration can keep the
# folder between runs. About 3.6 GB.
#
# Needs Python 3.11: the framework allows no later one. PYTHON names it. torch comes from wherever pip finds the pinned
# version; PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu has the small build for the CPU.
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)

digest=$(cat -- "$here/make_environment.sh" "$here/constraints.txt" | sha256sum | cut -c 1-12)
root=${GPUPARSE_OLYMPUS_ENV:-${XDG_CACHE_HOME:-$HOME/.cache}/gpuparse/olympus}
folder=$root/$digest
if [[ ${1:-} == --where ]]; then
  printf '%s\n' "$folder"
  exit
fi

python=${PYTHON:-python3.11}
if ! "$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
  printf '%s: %s is not Python 3.11 with venv; name one with PYTHON=...\n' "$0" "$python" >&2
  exit 1
fi

mkdir -p -- "$root"
exec 9>"$root/lock" # two runs at once: the second waits, and finds it made
flock 9
if [[ ! -f $folder/complete ]]; then
  {
    rm -rf -- "$folder"
    env -u PYTHONPATH -u PYTHONHOME "$python" -m venv "$folder"
    export PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_PROGRESS_BAR=off
    install=(env -u PYTHONPATH -u PYTHONHOME "$folder/bin/python" -m pip install --quiet --constraint "$here/constraints.txt")
    # torch first and by itself: what comes after must not bring another build.
    "${install[@]}" torch setuptools wheel
    # The file is complete, so that nothing needs to be resolved, and nothing that it does not name comes in: no torchvision.
    "${install[@]}" --no-deps --no-build-isolation --requirement "$here/constraints.txt"
    "$folder/bin/python" -m pip check
    touch -- "$folder/complete"
  } >&2
fi
printf '%s\n' "$folder"
