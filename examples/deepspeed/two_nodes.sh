#!/usr/bin/env bash
# Trains on two nodes: SSP groups stay inside a node, rows are replicated between the two.
#
#   bash examples/deepspeed/two_nodes.sh NODE0 NODE1 INTER [further arguments of train.py]
#
# From one node, with ssh without a password to both. Under a scheduler, or without ssh, start it on each node instead, with
# NODE_RANK=0 on NODE0 and NODE_RANK=1 on NODE1 (MASTER_PORT, 29500 by default, must be free on NODE0). The repository, INTER and
# --out have the same path on both; --out lies on storage that both share. SLOTS: GPUs of a node, 8 by default.
set -euo pipefail

if [ $# -lt 3 ]; then
    echo "usage: [NODE_RANK=0|1] bash examples/deepspeed/two_nodes.sh NODE0 NODE1 INTER [further arguments of train.py]" >&2
    exit 2
fi
here=$(cd "$(dirname "$0")" && pwd)
slots=${SLOTS:-8}
hosts=$(mktemp)
trap 'rm -f "$hosts"' EXIT
printf '%s slots=%s\n%s slots=%s\n' "$1" "$slots" "$2" "$slots" > "$hosts"
launch=(--hostfile "$hosts")
if [ -n "${NODE_RANK:-}" ]; then
    launch+=(--no_ssh --node_rank "$NODE_RANK" --master_addr "$1" --master_port "${MASTER_PORT:-29500}")
fi
inter=$3
shift 3

# consecutive ranks share a node: groups of SLOTS ranks never leave it
config=$(sed "s/\"size\": \"auto\"/\"size\": $slots/" "$here/ds_config_zero1.json")
# by its contents: the other node has no such file, and DeepSpeed takes a config in base64 too
encoded=$(base64 -w 0 <<< "$config" | tr '+/' '-_')
deepspeed "${launch[@]}" "$here/train.py" --inter "$inter" --deepspeed --deepspeed_config "$encoded" "$@"
