#!/usr/bin/env bash
# Installs, takes MovieLens-100k, trains the sequence recommender on several processes and reports.
#
#   bash examples/quickstart.sh                                  MovieLens-100k
#   bash examples/quickstart.sh --resume                         go on after Ctrl-C
#   bash examples/quickstart.sh --inter my.inter [--item my.item --class-columns category ...]
#   bash examples/quickstart.sh --megatron [--train-iters N ...]  through Megatron-core's TransformerBlock instead
#
# Options go to examples/recommender/train.py, after --megatron to examples/megatron/pretrain_recommender.py (--help lists them).
# PROCESSES sets the number of processes: one per GPU, 2 without.
set -euo pipefail
cd "$(dirname "$0")/.."
source examples/environment.sh
make_environment megatron,deepspeed,examples

megatron=
script=examples/recommender/train.py
if [ "${1:-}" = --megatron ]; then
  shift
  megatron=yes
  script=examples/megatron/pretrain_recommender.py
fi

case " $* " in
  *" --help "*) exec "$VENV/bin/python" -W ignore "$script" --help ;;  # once, not by every process
esac

previous=
for given in "$@"; do  # before torchrun, whose report would bury the message
  case "$previous" in
    --inter | --item) [ -f "$given" ] || { echo "$previous: $given is not a file; pass a RecBole atomic file" >&2; exit 2; } ;;
  esac
  previous=$given
done

options=()
case " $* " in
  *" --inter "*) ;;
  *)
    PYTHON=$VENV/bin/python bash examples/movielens.sh data/ml-100k
    options=(--inter data/ml-100k/ml-100k.inter)
    [ "$megatron" ] || options+=(--item data/ml-100k/ml-100k.item)
    ;;
esac

gpus=$("$VENV/bin/python" -c 'import torch; print(torch.cuda.device_count())')
processes=${PROCESSES:-$((gpus > 0 ? gpus : 2))}
cores=$(getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > processes ? cores / processes : 1))}

if [ "$megatron" ]; then
  options+=(--ta-ssp-size "$processes" --seq-length 20 --micro-batch-size 64 --train-iters 800 --lr 0.002)
  export PYTHONWARNINGS=${PYTHONWARNINGS-ignore::UserWarning}  # every rank would list what Megatron-core does without apex
fi

exec "$VENV/bin/torchrun" --standalone --nproc-per-node "$processes" "$script" ${options[@]+"${options[@]}"} "$@"
