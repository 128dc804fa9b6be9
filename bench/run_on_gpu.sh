#!/usr/bin/env bash
# All that only a GPU can show: what the machine is, the tests that need a GPU, compute-sanitizer on a short run of the
# loader, bench_device.py; and, where it is named, a quick `gpuparse bench` on the device, which takes as long as all of
# these. Goes on after a part that fails and says at the end which did; a call ends within nine minutes. Where
# gpuparse's CPU kernels are not built, bench/install_offline.sh builds them.
#
# Usage: bench/run_on_gpu.sh [PART ...]     (default: all but peers)
# PARTs: environment tests memcheck bench peers racecheck initcheck
#
# Variables: OUT     where log and JSON go (bench/results)
#            PYTHON  the interpreter (python3)
#            DATA    volumes to measure with, in BiomedParse's layout (generated ones)
#            LIMIT_SECONDS    for the whole (530)
#            GPUPARSE_COMMIT  what to call this checkout, where git is not to be asked
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
python=${PYTHON:-python3}
out=${OUT:-bench/results}
limit=${LIMIT_SECONDS:-530}
all=(environment tests memcheck bench peers racecheck initcheck)
parts=("$@")
(($#)) || parts=(environment tests memcheck bench racecheck initcheck)
for part in "${parts[@]}"; do
  if [[ " ${all[*]} " != *" $part "* ]]; then
    echo "run_on_gpu.sh: part is '$part'; expected some of: ${all[*]}" >&2
    exit 2
  fi
done
mkdir -p "$out" || exit 1
log=$out/run-on-gpu.log
: >"$log"
export PYTHONUNBUFFERED=1
SECONDS=0
passed=() failed=()

say() { echo "$*" | tee -a "$log"; }

# run NAME SECONDS COMMAND...: the command under its own limit and the whole's, whichever comes first.
run() {
  local name=$1 seconds=$2 status start=$SECONDS
  shift 2
  ((seconds > limit - SECONDS)) && seconds=$((limit - SECONDS))
  say "=== $name: $*"
  if ((seconds <= 0)); then
    say "=== $name: no time left of $limit s"
    failed+=("$name (no time left)")
    return
  fi
  timeout --kill-after=5 "$seconds" "$@" 2>&1 | tee -a "$log"
  status=${PIPESTATUS[0]}
  say "=== $name: status $status after $((SECONDS - start)) s"
  case $status in
    0) passed+=("$name") ;;
    124 | 137) failed+=("$name (stopped after $seconds s)") ;;
    *) failed+=("$name (status $status)") ;;
  esac
}

# sanitize TOOL: a short run under one of compute-sanitizer's tools: of the loader, or for the slower ones of the kernels.
sanitize() {
  local sanitizer program=bench/small_kernels.py
  [[ $1 == memcheck ]] && program=bench/small_pipeline.py
  sanitizer=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
  if [[ ! -x $sanitizer ]]; then
    say "=== $1: compute-sanitizer is not installed"
    failed+=("$1 (not installed)")
    return
  fi
  # Each allocation by itself, not a piece of a pool: else a kernel that leaves its array stays inside the pool.
  run "$1" 55 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 DALI_USE_DEVICE_MEM_POOL=0 DALI_USE_VMM=0 \
    "$sanitizer" --tool "$1" --error-exitcode 9 --print-limit 20 "$python" "$program"
  say "=== $1: lines that name gpuparse's kernels: $(sed -n "/^=== $1: env/,/^=== $1: status/p" "$log" \
    | grep -cE '^=========.*\b(encode|encode_mask|augment|augment_tiles|place_blocks)\b')"
}

# The checkout itself is what runs, not a copy that was installed earlier.
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
if ! "$python" -c 'import gpuparse.convert, gpuparse.loader' >>"$log" 2>&1; then
  say "=== gpuparse cannot be imported: $(tail -n 1 "$log"). Install what it names; no part was run."
  exit 1
fi
if ! "$python" -c 'from gpuparse.kernels import host_library; host_library()' >>"$log" 2>&1; then
  run install 60 bench/install_offline.sh
fi
if [[ " ${parts[*]} " == *" peers "* ]] && ! "$python" -m gpuparse --version >>"$log" 2>&1; then
  say "=== the command line cannot run, which peers needs: $(tail -n 1 "$log"). No part was run."
  exit 1
fi

for part in "${parts[@]}"; do
  case $part in
    environment)
      run nvidia-smi 15 nvidia-smi
      run environment 30 "$python" bench/bench_device.py --about --json "$out/environment.json"
      ;;
    tests)
      mapfile -t files < <(grep -l 'mark\.gpu' tests/test_*.py)
      run tests 140 env GPUPARSE_REQUIRE_GPU=1 "$python" -m pytest -m gpu -p no:cacheprovider --durations=8 "${files[@]}"
      ;;
    memcheck | racecheck | initcheck) sanitize "$part" ;;
    bench)
      run bench 190 "$python" bench/bench_device.py --json "$out/device.json" ${DATA:+--data "$DATA"}
      # Some of the generated volumes have three views, and their slices lie in many chunks.
      [[ -z ${DATA:-} ]] \
        || run bench-generated 40 "$python" bench/bench_device.py --part kernels --json "$out/device-generated.json"
      ;;
    peers)
      # Those of the peers that have something to do on a GPU, where they are installed, beside the reference. Each of
      # MONAI's trials fills its cache anew; results are written part by part.
      run peers 500 "$python" -m gpuparse bench --device cuda --quick --part loader --part epoch \
        --against reference,monai,dali-png --out "$out/peers" ${DATA:+--data "$DATA"}
      ;;
  esac
done

say "=== passed: ${passed[*]:-nothing}"
if ((${#failed[@]})); then
  say "=== FAILED: $(printf '%s; ' "${failed[@]}")"
  exit 1
fi
