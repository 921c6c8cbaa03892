#!/usr/bin/env bash
# What needs a GPU: the operators' tests on CUDA, compute-sanitizer over small shapes, then the benchmark of the operators.
#   tests/gpu.sh [PYTHON [PYTEST ARGUMENTS]]     each part says how it ended; exits with the number of parts that failed
# TA_BENCHMARK=0 leaves the benchmark out.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}
shift $(($# > 0))
[ "$("$python" -c "import torch; print(torch.cuda.device_count())")" -gt 0 ] || { echo "no GPU that torch sees" >&2; exit 2; }
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 OMP_NUM_THREADS=4 TA_TEST_DEVICES=cuda
failed=0
part() {
  local name=$1 begin=$SECONDS
  shift
  echo "== $name"
  if "$@"; then echo "== $name: passed, $((SECONDS - begin)) s"; else
    echo "== $name: FAILED, $((SECONDS - begin)) s"
    failed=$((failed + 1))
  fi
}

part tests timeout 900 "$python" -m pytest -q -p no:cacheprovider tests/ops tests/test_unique_space.py tests/attention/test_merge.py \
  tests/attention/test_causal_on_cuda.py tests/test_cuda.py --ignore tests/ops/test_builders.py "$@"
if [ "${TA_BENCHMARK:-1}" = 1 ]; then part benchmark timeout 600 "$python" examples/benchmarks/ops.py; fi
# without torch's cache every tensor is an allocation of its own, whose ends memcheck knows
for tool in memcheck racecheck; do
  part $tool env PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 300 compute-sanitizer --tool $tool --error-exitcode 9 \
    --kernel-name-exclude kernel_substring=at:: "$python" tests/ops/small_shapes.py
done
exit $failed
