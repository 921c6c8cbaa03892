#!/usr/bin/env bash
# Target attention on this machine's GPU: tests, compute-sanitizer, benchmarks. Results go to standard output; a step that fails
# is named at the end. Takes two to three minutes with the extensions built (DS_BUILD_TA_TARGET_ATTENTION=1
# DS_BUILD_TA_ROWS=1 DS_BUILD_TA_PLAN=1 python setup.py build_ext --inplace), otherwise the first call builds them.
set -uo pipefail
cd "$(dirname "$0")/../.."
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
failed=()
step() {  # step NAME SECONDS COMMAND...
  local name=$1 limit=$2 started=$SECONDS
  shift 2
  echo "== $name"
  timeout "$limit" "$@" || failed+=("$name")
  echo "== $name: $((SECONDS - started)) s"
}
only=${1:-tests sanitizer benchmarks flex}
if [[ $only == *tests* ]]; then
  step tests 120 "$python" -m pytest -q -p no:cacheprovider tests/ops/test_target_attention.py -k cuda
fi
if [[ $only == *sanitizer* ]]; then
  for tool in memcheck racecheck; do
    step $tool 120 compute-sanitizer --tool $tool --print-limit 10 --kernel-name kernel_substring=target_attention --error-exitcode 9 \
      "$python" tests/gpu/target_attention_small.py
  done
fi
if [[ $only == *benchmarks* ]]; then
  step kernel 60 "$python" examples/benchmarks/target_attention.py --peers occurrences
  step kernel-fp32 60 "$python" examples/benchmarks/target_attention.py --peers occurrences --dtype float32 --targets 1 4 8
  step kernel-16k 60 "$python" examples/benchmarks/target_attention.py --peers occurrences --length 16384 --targets 1 8
  step owner-fp32 60 "$python" examples/benchmarks/owner_step.py
  step owner-bf16 60 "$python" examples/benchmarks/owner_step.py --dtype bfloat16
fi
if [[ $only == *flex* ]]; then  # FlexAttention compiles for a minute
  step expanded 90 "$python" examples/benchmarks/target_attention.py --peers expanded --targets 2
fi
if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}"
  exit 1
fi
