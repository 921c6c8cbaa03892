#!/usr/bin/env bash
# Trains on two nodes of eight GPUs: SSP groups stay inside a node, rows are replicated between the two.
#
#   bash examples/deepspeed/two_nodes.sh NODE0 NODE1 INTER [further arguments of train.py]
#
# Needs ssh without a password to both nodes, and the same path of this repository, of INTER and of --out on both.
set -euo pipefail

if [ $# -lt 3 ]; then
    echo "usage: bash examples/deepspeed/two_nodes.sh NODE0 NODE1 INTER [further arguments of train.py]" >&2
    exit 2
fi
here=$(cd "$(dirname "$0")" && pwd)
hosts=$(mktemp)
config=$(mktemp --suffix=.json)
trap 'rm -f "$hosts" "$config"' EXIT
printf '%s slots=8\n%s slots=8\n' "$1" "$2" > "$hosts"
inter=$3
shift 3

# consecutive ranks share a node: size 8 is one SSP group per node
sed 's/"size": "auto"/"size": 8/' "$here/ds_config_zero1.json" > "$config"
# by its contents: the file exists on this node only, and DeepSpeed takes a config in base64 too
encoded=$(base64 -w 0 "$config" | tr '+/' '-_')
deepspeed --hostfile "$hosts" "$here/train.py" --inter "$inter" --deepspeed --deepspeed_config "$encoded" "$@"
