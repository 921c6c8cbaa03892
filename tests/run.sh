#!/usr/bin/env bash
# Installs what the tests need and runs them: lint, format, types, pytest, and beside it the newest hosts (tests/newest.sh), whose
# output comes last. Arguments go to pytest, and leave out the rest.
set -euo pipefail
cd "$(dirname "$0")/.."
source examples/environment.sh
make_environment megatron,deepspeed,examples,test

export OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-}
export TORCH_EXTENSIONS_DIR=$(cd "$VENV" && pwd)/extensions
rm -rf "$TORCH_EXTENSIONS_DIR"  # a build that was killed leaves a lock, for which the next one would wait for ever
if [ $# -gt 0 ]; then
  exec "$VENV/bin/python" -m pytest "$@"
fi
"$VENV/bin/ruff" check .
"$VENV/bin/ruff" format --check .
"$VENV/bin/mypy"

log=$VENV/newest.log
MAX_JOBS=1 bash tests/newest.sh >"$log" 2>&1 &  # one compiler at a time: the tests beside it need a core
newest=$!
trap 'kill $newest 2>/dev/null || true' EXIT
failed=0
"$VENV/bin/python" -m pytest || failed=$?
wait $newest || failed=$?
trap - EXIT
cat "$log"
exit $failed
