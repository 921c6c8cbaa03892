#!/usr/bin/env bash
# What the gloo ranks of the tests do, done under NCCL: a GPU per rank, on two GPUs or more (tests for four say that they skip on two).
#   tests/gpu/nccl.sh ["PART ..."]     PYTHON names the interpreter; the parts run side by side and are reported in order.
#   LIMIT_S seconds end them; TAIL lines of each are shown.
# Needs pytest, hypothesis and the hosts; operators that are not built are compiled on first use.
set -uom pipefail  # with job control, what runs in the background can be interrupted and then says how far it came
cd "$(dirname "$0")/../.."
parts=(errors core rows examples megatron-layouts megatron megatron-checkpoint deepspeed deepspeed-beside deepspeed-checkpoint)
python=${PYTHON:-python3} only=${1:-${parts[*]}} limit=${LIMIT_S:-1200}
logs=$(mktemp -d)
[ "$("$python" -c "import torch; print(torch.cuda.device_count())")" -gt 0 ] || { echo "no GPU that torch sees" >&2; exit 2; }
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 OMP_NUM_THREADS=2 TA_TEST_DEVICES=cuda
# all parts share the GPUs, and hosts make many communicators: small ones; every rank compiles, so each with one thread
export NCCL_MAX_NCHANNELS=${NCCL_MAX_NCHANNELS:-2} NCCL_BUFFSIZE=${NCCL_BUFFSIZE:-1048576} TORCHINDUCTOR_COMPILE_THREADS=${TORCHINDUCTOR_COMPILE_THREADS:-1}
declare -A started
part() {  # part NAME PYTEST-ARGUMENTS...
  local name=$1
  shift
  [[ " $only " == *" $name "* ]] || return
  timeout -s INT -k 5 "$limit" "$python" -m pytest -v -rs -p no:cacheprovider --durations 5 "$@" >"$logs/$name" 2>&1 &
  started[$name]=$!
}

part errors tests/test_errors_on_ranks.py tests/test_sequence_errors.py tests/parallel -k "not in_vain"  # NCCL ends who waits in vain
part core tests/test_captured_on_ranks.py tests/test_bounds_on_ranks.py tests/test_precision_on_ranks.py tests/test_tokenized_attention.py \
  tests/test_sequence_layout.py tests/strategies/test_causal_ranks.py tests/strategies/test_ring_traffic.py -k "not test_one_rank"
part rows tests/test_embedding.py tests/test_routing.py tests/models/test_mixed_decoder_over_ranks.py \
  -k "mixed_decoder or nobody_owns or every_id or steps_equal_torch_on_ranks or agree or rfc_steps"
part examples tests/examples/test_megatron_example.py
part megatron-layouts tests/megatron/test_megatron_layouts.py
part megatron tests/megatron/test_megatron_bf16.py tests/megatron/test_megatron_sequence.py \
  tests/megatron/test_megatron_token_keyed.py tests/megatron/test_megatron_microbatches.py
part megatron-checkpoint tests/megatron/test_megatron_checkpoint.py
part deepspeed tests/deepspeed/test_training.py tests/deepspeed/test_deepspeed_sequence.py
part deepspeed-beside tests/deepspeed/test_parallel.py
part deepspeed-checkpoint tests/deepspeed/test_checkpoint.py

failed=()
for name in "${parts[@]}"; do
  [ -n "${started[$name]:-}" ] || continue
  wait "${started[$name]}" || failed+=("$name")
  echo "== $name"
  tail -n "${TAIL:-60}" "$logs/$name"
done
rm -rf "$logs"
if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}"
  exit 1
fi
