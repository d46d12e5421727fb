#!/usr/bin/env bash
# Fine-tunes a run config on the GPUs of this machine, one process per GPU (two CPU ranks where there is none).
#
# usage: scripts/launch_single_node.sh CONFIG [--gpus N] [--deepspeed FILE] [options of scripts/train.py ...]
#
#   CONFIG            a shipped run config (deris-llm config list) or a .yaml file
#   --gpus N          processes, one per GPU (default: all GPUs)
#   --deepspeed FILE  default ds_configs/zero2.json
#
#   scripts/launch_single_node.sh deris-7b-refcoco
#   scripts/launch_single_node.sh deris-7b-refcoco --gpus 4 --deepspeed ds_configs/zero3.json --set data.root=/data/refer
#   scripts/launch_single_node.sh tiny-refcoco --fast-dev-run
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=scripts/_env.sh
source "$root/scripts/_env.sh"

usage() { sed -n '2,/^set -euo/{/^set -euo/d;s/^# \{0,1\}//p}' "$0"; }

if [[ $# -eq 0 || $1 == -h || $1 == --help ]]; then
  usage
  exit $(($# == 0 ? 2 : 0))
fi
config="$1"
shift
gpus=""
deepspeed_json="$root/ds_configs/zero2.json"
rest=()
while [[ $# -gt 0 ]]; do
  case "$1" in
    --gpus) gpus="${2:?--gpus needs a number}" && shift 2 ;;
    --deepspeed) deepspeed_json="${2:?--deepspeed needs a file}" && shift 2 ;;
    *) rest+=("$1") && shift ;;
  esac
done
if [[ -z $gpus ]]; then
  gpus="$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)"
  [[ $gpus -gt 0 ]] || gpus=2
fi
port="$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')"

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
set -x
exec deepspeed --num_gpus "$gpus" --master_port "$port" "$root/scripts/train.py" \
  --config "$config" --deepspeed "$deepspeed_json" "${rest[@]}"
