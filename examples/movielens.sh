#!/usr/bin/env bash
# Puts MovieLens-100k (100,000 ratings) into DIR as ml-100k.inter, ml-100k.item and ml-100k.user.
#
#   bash examples/movielens.sh DIR
#
# The files come out of the RecBole 1.2.1 wheel, which is downloaded from the package index and not installed. Does
# nothing where they are already there. PYTHON names the interpreter, python3 by default.
set -euo pipefail

if [ $# -ne 1 ]; then
    echo "usage: bash examples/movielens.sh DIR" >&2
    exit 2
fi
dir=$1
python=${PYTHON:-python3}

if [ -f "$dir/ml-100k.inter" ] && [ -f "$dir/ml-100k.item" ] && [ -f "$dir/ml-100k.user" ]; then
    echo "MovieLens-100k is in $dir"
    exit 0
fi

mkdir -p "$dir"
scratch=$(mktemp -d "$dir/.download.XXXXXX") # beside the result, so that the moves below are atomic
trap 'rm -rf "$scratch"' EXIT

"$python" -m pip download recbole==1.2.1 --no-deps --only-binary=:all: --quiet --disable-pip-version-check \
    --dest "$scratch"
"$python" - "$scratch" <<'PYTHON'
import pathlib
import sys
import zipfile

scratch = pathlib.Path(sys.argv[1])
(wheel,) = scratch.glob("recbole-*.whl")
with zipfile.ZipFile(wheel) as archive:
    for kind in ("inter", "item", "user"):
        name = f"ml-100k.{kind}"
        (scratch / name).write_bytes(archive.read(f"recbole/dataset_example/ml-100k/{name}"))
lines = (scratch / "ml-100k.inter").read_text(encoding="utf-8").splitlines()
if len(lines) - 1 != 100_000:
    sys.exit(f"ml-100k.inter holds {len(lines) - 1} interactions instead of 100000; the wheel is not the one expected")
PYTHON

for kind in user item inter; do
    mv "$scratch/ml-100k.$kind" "$dir/ml-100k.$kind"
done
echo "MovieLens-100k: 100000 interactions in $dir"
