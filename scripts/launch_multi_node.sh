#!/usr/bin/env bash
# Fine-tunes a run config on several machines, started once, on the first of them, over ssh without passwords.
#
# usage: scripts/launch_multi_node.sh HOSTFILE CONFIG [--port P] [--deepspeed FILE] [options of scripts/train.py ...]
#
#   HOSTFILE          a line per machine, its name and number of GPUs: "node1 slots=8"
#   CONFIG            a shipped run config (deris-llm config list) or a .yaml file
#   --port P          TCP port on the first machine (default 29500)
#   --deepspeed FILE  default ds_configs/zero2.json
#
# All machines need the same checkout and environment at the same paths, the data, and the output folder on a shared disk
# (the first rank alone writes checkpoints; every rank reads them when a run goes on). Variables that the other machines
# shall see (OMP_NUM_THREADS, HF_HOME, GLOO_SOCKET_IFNAME, ...) go into a file .deepspeed_env in the folder where this is started, or
# in the home folder, NAME=VALUE each; NCCL_* and PYTHON* are passed on without it. Ctrl-C ends every run that DeepSpeed's launcher
# started for you on these machines.
#
#   scripts/launch_multi_node.sh hostfile deris-7b-refcoco --output /shared/runs/deris-7b --set data.root=/shared/refer
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=scripts/_env.sh
source "$root/scripts/_env.sh"

usage() { sed -n '2,/^set -euo/{/^set -euo/d;s/^# \{0,1\}//p}' "$0"; }

if [[ $# -eq 0 || $1 == -h || $1 == --help ]]; then
  usage
  exit $(($# == 0 ? 2 : 0))
fi
if [[ $# -lt 2 ]]; then
  echo "error: expected HOSTFILE and CONFIG, got $# argument; see --help" >&2
  exit 2
fi
hostfile="$1"
config="$2"
shift 2
if ! grep -qE '^[^#[:space:]]+[[:space:]]+slots=[0-9]+' "$hostfile"; then
  echo "error: hostfile $hostfile: expected lines like 'node1 slots=8', found none; write one line per machine" >&2
  exit 2
fi
port=29500
deepspeed_json="$root/ds_configs/zero2.json"
rest=()
while [[ $# -gt 0 ]]; do
  case "$1" in
    --port) port="${2:?--port needs a number}" && shift 2 ;;
    --deepspeed) deepspeed_json="${2:?--deepspeed needs a file}" && shift 2 ;;
    *) rest+=("$1") && shift ;;
  esac
done

arguments=(--config "$config" --deepspeed "$deepspeed_json" "${rest[@]}")
if (($(grep -cE '^[^#[:space:]]+[[:space:]]+slots=' "$hostfile") > 1)); then
  # Shells of the machines read the command. DeepSpeed puts arguments with a blank in double quotes, and the others in none.
  for i in "${!arguments[@]}"; do
    if [[ ${arguments[i]} == *" "* ]]; then
      # shellcheck disable=SC2001 # a replacement that keeps what it found
      arguments[i]="$(sed 's/[\\$`]/\\&/g' <<<"${arguments[i]}")"
    else
      printf -v "arguments[i]" %q "${arguments[i]}"
    fi
  done
fi

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
set -x
exec deepspeed --hostfile "$hostfile" --master_port "$port" "$root/scripts/train.py" "${arguments[@]}"
