#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# One unattended session on a machine with a GPU, under ten minutes, without a network: build, test every GPU
# backend, benchmark, sanitize. A step that fails or runs out of its time does not stop the next.
#
#   benchmarks/gpu_session.sh [FOLDER]     logs and results go to FOLDER, else to $OUT, else to benchmarks/results
#
# PYTHON names the interpreter that holds torch (python3). The exit status is that of the worst step.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2

readonly python=${PYTHON:-python3}
readonly out=${1:-${OUT:-benchmarks/results}}
readonly total=575 # seconds for everything
mkdir -p "$out" || exit 2
rm -f "$out"/{build,tests,benchmark,sanitize}.log
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TRITON_INTERPRET=0
summary=()
worst=0
SECONDS=0

# step NAME SECONDS COMMAND...: runs it under its limit, a line for the table; the output goes into a log named
# for what precedes a hyphen. A run that is out of time gets an interrupt, so that pytest still says what failed.
step() {
  local name=$1 limit=$2 left=$((total - SECONDS)) begin=$SECONDS status=0 verdict log
  shift 2
  log="$out/${name%%-*}.log"
  if ((limit > left)); then limit=$left; fi
  echo "== $name (at most $limit s)"
  if ((limit < 5)); then
    summary+=("$(printf '%-13s %6s  %s' "$name" - "not run: no time was left")")
    worst=1
    return
  fi
  timeout --signal=INT --kill-after=10 "$limit" "$@" >>"$log" 2>&1 </dev/null || status=$?
  case $status in
    0) verdict=ok ;;
    77) verdict=skipped ;;
    124 | 137) verdict="out of time ($limit s)" ;;
    *) verdict="failed ($status)" ;;
  esac
  if ((status != 0 && status != 77)); then worst=1; fi
  tail -n 12 "$log"
  summary+=("$(printf '%-13s %5ss  %-20s %s' "$name" $((SECONDS - begin)) "$verdict" "$(last_line "$log")")")
}

last_line() {
  grep -E '[^[:space:]]' "$1" | tail -n 1 | cut -c 1-110
}

has() {
  "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"
}

build() {
  VOSOPS_BUILD_CUDA=1 "$python" setup.py build_ext --inplace || return
  "$python" -c 'import vosops; print(vosops.backend_report())'
}

gpu_tests() {
  local options=(-q -p no:cacheprovider --durations=10 --tb=short)
  export TORCHINDUCTOR_COMPILE_THREADS=1 # every worker compiles by itself
  if has xdist; then options+=(-n "$(($(nproc) < 12 ? $(nproc) : 12))"); fi
  if has pytest_timeout; then options+=(--timeout=100); fi
  "$python" -m pytest tests/gpu "${options[@]}" -k "$1"
}

# What `python -m benchmarks.run memory_read --device cuda --all --json FILE` does, without the packages that the
# other commands of the same command line need.
bench() {
  "$python" - "$out" <<'END'
import sys
from pathlib import Path

import torch

from benchmarks import gpu, run

name = f"memory_read-{gpu.short_name(torch.cuda.get_device_name())}.json"
run.run("memory_read", device="cuda", everything=True, target=Path(sys.argv[1]) / name)
END
}

# Without the caching allocator an access out of bounds leaves its allocation, and is seen.
sanitize() {
  local tool
  tool=$(command -v compute-sanitizer) || {
    echo "compute-sanitizer is not installed"
    return 77
  }
  "$tool" --version
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$tool" --tool memcheck --error-exitcode 9 --print-limit 20 \
    "$python" -m pytest tests/gpu/test_memory_read.py -q -p no:cacheprovider \
    -k "(test_top_k and l2_both and 7) or (test_strides and crop) or (test_memory_beside_the_block_sizes and 129)"
}

export -f build gpu_tests bench sanitize has
export python out

step build 110 bash -c build
step tests-triton 150 bash -c 'gpu_tests "not cuda"'
step tests-cuda 60 bash -c 'gpu_tests "cuda"'
step benchmark 200 bash -c bench
step sanitize 55 bash -c sanitize

echo
for result in "$out"/memory_read-*.json; do
  if [[ $result -nt $out/build.log ]]; then "$python" -m benchmarks.gpu "$result"; fi
done
printf '%s\n' "${summary[@]}"
echo "total $SECONDS s, files in $out"
exit "$worst"
