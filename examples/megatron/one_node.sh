#!/usr/bin/env bash
# One node, every GPU (or two CPU processes): bash examples/megatron/one_node.sh [arguments]
# SCRIPT names what runs: examples/megatron/pretrain_recommender.py, or pretrain_gpt.py beside it.
set -euo pipefail
cd "$(dirname "$0")/../.."

processes=$(python -c 'import torch; print(torch.cuda.device_count() or 2)')
export CUDA_DEVICE_MAX_CONNECTIONS=1  # Megatron's order of kernels under tensor and sequence parallelism depends on it
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export PYTHONWARNINGS=${PYTHONWARNINGS-ignore::UserWarning}  # every rank would list what Megatron-core does without apex

exec torchrun --standalone --nproc_per_node "$processes" "${SCRIPT:-examples/megatron/pretrain_recommender.py}" \
    --ta-ssp-size "$processes" "$@"
