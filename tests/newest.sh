#!/usr/bin/env bash
# Tests marked "newest" on Python 3.12: the newest Megatron-core that constraints.txt names, and a CUDA build of torch, with which
# operators compile where there is nvcc. tests/run.sh runs it beside its own; alone it takes pytest arguments. PYTHON312 names the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
source examples/environment.sh

python312() {
  local candidate
  for candidate in ${PYTHON312:-} python3.12 "$HOME"/.pyenv/versions/3.12*/bin/python3.12; do
    if "$candidate" -c 'import sys, venv; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  return 1
}

if ! PYTHON=$(python312); then
  echo "NOT RUN: tests on the newest hosts. They need Python 3.12; none was found, set PYTHON312 to one." >&2
  exit 0
fi
VENV=${VENV:-.venv}312
echo "tests on the newest hosts: $("$PYTHON" --version) in $VENV"
make_environment megatron,deepspeed,test

if [ -z "${CUDA_HOME:-}" ] && [ -x /usr/local/cuda/bin/nvcc ]; then
  export CUDA_HOME=/usr/local/cuda
fi
command -v "${CUDA_HOME:-}/bin/nvcc" >/dev/null || echo "no nvcc in CUDA_HOME: tests that compile for CUDA say that they skip" >&2
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0} OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-}
TORCH_EXTENSIONS_DIR=$(cd "$VENV" && pwd)/extensions
export TORCH_EXTENSIONS_DIR
rm -rf "$TORCH_EXTENSIONS_DIR"
exec "$VENV/bin/python" -m pytest -m newest "$@"
