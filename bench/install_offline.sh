#!/usr/bin/env bash
# Builds the CPU kernels into gpuparse/_native with g++ alone: no network, no pip, no CMake. After it the checkout is
# usable as it stands, with PYTHONPATH set to its root. For machines that have gpuparse's dependencies and no way to
# install it; elsewhere `pip install -e .` does more. Run it again after an edit in kernels/; `rm -r gpuparse/_native`
# undoes it.
# Usage: bench/install_offline.sh      (CXX chooses another compiler)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
compiler=${CXX:-g++}
if ! command -v "$compiler" >/dev/null; then
  echo "install_offline.sh: no C++ compiler '$compiler'; expected g++ 9 or newer, or another one named in CXX" >&2
  exit 1
fi

# The digest that gpuparse/kernels.py demands: over the digests of all sources, ordered by name.
sources=$(cd kernels && printf '%s\n' *.cu *.h *.cpp | LC_ALL=C sort)
digest=$(cd kernels && for file in $sources; do sha256sum <"$file" | cut -d ' ' -f 1; done | tr -d '\n' \
  | sha256sum | cut -d ' ' -f 1)

# The flags of kernels/CMakeLists.txt; tests/test_bench_device.py compares them.
flags=(-std=c++17 -O3 -ffp-contract=off -fno-math-errno -fno-trapping-math -fvisibility=hidden -fPIC -shared -pthread)
avx2=(-mavx2 -mfma -mf16c -mbmi2 -mtune=haswell)
# Of g++ alone, as there; clang defines its macros too, so that its own one tells.
if [[ $("$compiler" -dM -E -x c++ /dev/null) != *__clang__* ]]; then flags+=(-falign-loops=32); fi

# Built aside and moved: a process that has the old library open keeps it.
mkdir -p gpuparse/_native
work=$(mktemp -d gpuparse/_native/.build-XXXXXX)
trap 'rm -rf "$work"' EXIT
build() {
  local name=$1
  shift
  "$compiler" "${flags[@]}" "$@" "-DGPUPARSE_SOURCE_DIGEST=\"$digest\"" kernels/host.cpp -o "$work/$name"
}
jobs=()
build libgpuparse_kernels.so & jobs+=($!)
case $(uname -m) in
  x86_64 | amd64) build libgpuparse_kernels_avx2.so "${avx2[@]}" & jobs+=($!) ;;
esac
for job in "${jobs[@]}"; do wait "$job"; done
mv "$work"/*.so gpuparse/_native/
echo "built $(cd gpuparse/_native && echo *.so) from kernels with digest ${digest:0:12}"
echo "now: export PYTHONPATH=$PWD\${PYTHONPATH:+:\$PYTHONPATH}"
