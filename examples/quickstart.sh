#!/usr/bin/env bash
# Installs, takes MovieLens-100k, trains the sequence recommender on several processes and reports.
#
#   bash examples/quickstart.sh                                  MovieLens-100k
#   bash examples/quickstart.sh --resume                         go on after Ctrl-C
#   bash examples/quickstart.sh --inter my.inter [--item my.item --class-columns category ...]
#
# Options go to examples/recommender/train.py (--help lists them). PROCESSES sets the number of processes (2, or one per GPU).
set -euo pipefail
cd "$(dirname "$0")/.."
source examples/environment.sh
make_environment megatron,deepspeed,examples

data=()
case " $* " in
  *" --inter "* | *" --help "*) ;;
  *)
    PYTHON=$VENV/bin/python bash examples/movielens.sh data/ml-100k
    data=(--inter data/ml-100k/ml-100k.inter --item data/ml-100k/ml-100k.item)
    ;;
esac

gpus=$("$VENV/bin/python" -c 'import torch; print(torch.cuda.device_count())')
processes=${PROCESSES:-$((gpus > 1 ? gpus : 2))}
cores=$(getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > processes ? cores / processes : 1))}

exec "$VENV/bin/torchrun" --standalone --nproc-per-node "$processes" examples/recommender/train.py \
  ${data[@]+"${data[@]}"} "$@"
