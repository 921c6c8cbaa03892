#!/usr/bin/env bash
# Installs what the tests need and runs them: lint, format, types, pytest, then the newest hosts (tests/newest.sh). Arguments go to
# pytest, and leave out the rest.
set -euo pipefail
cd "$(dirname "$0")/.."
source examples/environment.sh
make_environment megatron,deepspeed,examples,test

export OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-}
export TORCH_EXTENSIONS_DIR=$(cd "$VENV" && pwd)/extensions
rm -rf "$TORCH_EXTENSIONS_DIR"  # a build that was killed leaves a lock, for which the next one would wait for ever
if [ $# -eq 0 ]; then
  "$VENV/bin/ruff" check .
  "$VENV/bin/ruff" format --check .
  "$VENV/bin/mypy"
fi
"$VENV/bin/python" -m pytest "$@"
if [ $# -eq 0 ]; then
  bash tests/newest.sh
fi
