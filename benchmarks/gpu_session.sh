#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# One unattended session on a machine with a GPU, under ten minutes, without a network: build, test every GPU
# backend, benchmark every operator, sanitize. A step that fails or runs out of its time does not stop the next.
#
#   benchmarks/gpu_session.sh [FOLDER [STEP...]]
#
# Logs and results go to FOLDER, else to $OUT, else to benchmarks/results. Without STEP all of them run, in the
# order and with the seconds planned below; what a step leaves over, the later ones may use. Named steps have the
# whole session for themselves, so that two or three sessions measure what one must cut short. PYTHON names the
# interpreter that holds torch (python3). The exit status is that of the worst step, 2 for wrong arguments.
set -uo pipefail

# By weight: nothing counts that is not right; then what issues set targets for. A benchmark writes its file after
# every case and begins with its targets, so its seconds may be fewer than it could use.
readonly total=550 # seconds for all steps; the tables and plots of the end take up to 30 more
readonly plan=(
  build=85
  tests-triton=105
  tests-cuda=45
  benchmark-local_attention=70
  benchmark-attention=70
  benchmark-memory_read=110
  benchmark-identity=25
  sanitize=35
)

cd "$(dirname "$0")/.." || exit 2
readonly python=${PYTHON:-python3}
readonly out=${1:-${OUT:-benchmarks/results}}
declare -A planned=()
order=()
for entry in "${plan[@]}"; do
  planned[${entry%=*}]=${entry#*=}
  order+=("${entry%=*}")
done
if (($# > 1)); then
  for name in "${@:2}"; do
    if [[ -z ${planned[$name]:-} ]]; then
      echo "$0: there is no step '$name': ${order[*]}" >&2
      exit 2
    fi
  done
  order=("${@:2}")
fi
mkdir -p "$out" || exit 2
readonly started=$(mktemp)
trap 'rm -f "$started"' EXIT
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TRITON_INTERPRET=0
summary=()
worst=0
SECONDS=0

# step NAME RESERVED COMMAND...: runs it in the time that is left but for RESERVED seconds, a line for the table,
# the output into NAME.log. A run that is out of time gets an interrupt, so that pytest still says what failed.
step() {
  local name=$1 limit=$((total - SECONDS - $2)) begin=$SECONDS status=0 verdict
  local log="$out/$name.log"
  shift 2
  echo "== $name (at most $limit s)"
  if ((limit < 5)); then
    summary+=("$(printf '%-26s %6s  %s' "$name" - "not run: no time was left")")
    worst=1
    return
  fi
  timeout --signal=INT --kill-after=10 "$limit" "$@" >"$log" 2>&1 </dev/null || status=$?
  case $status in
    0) verdict=ok ;;
    77) verdict=skipped ;;
    124 | 137) verdict="out of time ($limit s)" ;;
    *) verdict="failed ($status)" ;;
  esac
  if ((status != 0 && status != 77)); then worst=1; fi
  tail -n 12 "$log"
  summary+=("$(printf '%-26s %5ss  %-20s %s' "$name" $((SECONDS - begin)) "$verdict" "$(last_line "$log")")")
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

# The operators that no GPU has run yet first: a session that is cut short should not leave them out again.
gpu_tests() {
  local options=(-q -p no:cacheprovider --durations=10 --tb=short)
  export TORCHINDUCTOR_COMPILE_THREADS=1 # every worker compiles by itself
  if has xdist; then options+=(-n "$(($(nproc) < 14 ? $(nproc) : 14))"); fi
  if has pytest_timeout; then options+=(--timeout=100); fi
  "$python" -m pytest tests/gpu/test_local_attention.py tests/gpu/test_attention*.py tests/gpu/test_identity.py \
    tests/gpu/test_memory_read*.py tests/gpu/test_aggregate.py "${options[@]}" -k "$1"
}

# What `python -m benchmarks.run OPERATOR --device cuda --all --json FILE` does, without the packages that the
# other commands of the same command line need.
bench() {
  "$python" - "$out" "$1" <<'END'
import sys
from pathlib import Path

import torch

from benchmarks import gpu, run

folder, operator = sys.argv[1:]
name = f"{operator}-{gpu.short_name(torch.cuda.get_device_name())}.json"
run.run(operator, device="cuda", everything=True, target=Path(folder) / name)
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
    "$python" -m pytest tests/gpu/test_local_attention.py tests/gpu/test_memory_read.py tests/gpu/test_attention.py \
    -q -p no:cacheprovider -k "(cuda and test_low_precision and 14 and weight) or (test_top_k and l2_both and 7) \
      or (test_memory_read and test_strides and crop) or (test_memory_beside_the_block_sizes and 129) \
      or (test_any_size and 129 and 33)"
}

export -f build gpu_tests bench sanitize has
export python out

for index in "${!order[@]}"; do
  reserved=0
  for later in "${order[@]:index+1}"; do reserved=$((reserved + planned[$later])); done
  name=${order[index]}
  case $name in
    build) step build "$reserved" bash -c build ;;
    tests-triton) step tests-triton "$reserved" bash -c 'gpu_tests "not cuda"' ;;
    tests-cuda) step tests-cuda "$reserved" bash -c 'gpu_tests "cuda"' ;;
    benchmark-*) step "$name" "$reserved" bash -c "bench ${name#benchmark-}" ;;
    sanitize) step sanitize "$reserved" bash -c sanitize ;;
  esac
done

echo
results=()
for name in "${order[@]}"; do
  if [[ $name == benchmark-* ]]; then
    for result in "$out/${name#benchmark-}"-*.json; do
      if [[ $result -nt $started ]]; then results+=("$result"); fi
    done
  fi
done
if ((${#results[@]})); then timeout 30 "$python" -m benchmarks.gpu "${results[@]}"; fi
printf '%s\n' "${summary[@]}"
echo "total $SECONDS s, files in $out"
exit "$worst"
