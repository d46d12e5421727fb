#!/usr/bin/env bash
# Runs scripts/launch_multi_node.sh, and torchrun --nnodes 2, on two hosts with real ssh and pdsh, on this machine.
#
# usage: scripts/rehearse/hosts.sh [--install] [--world DIR] [--only REGEX] [WORK]
#
#   --install    first install Debian's packages openssh-server, openssh-client and pdsh
#   --world DIR  a data root (default: a small synthetic world is made)
#   --only REGEX only the checks whose names match
#   WORK         folder for keys, logs and runs (default: a temporary one, which is deleted if all passed)
#
# Each "host" is an ssh daemon with a host name and process ids of its own, on a loopback address; both share this machine's disk
# and network. What is rehearsed: the losses of two hosts with a rank each are those of one machine with two ranks; arguments with
# blanks, quotes and < | $ arrive unchanged; a rank that dies on one host ends the run on both; Ctrl-C ends it on both. Takes about
# five minutes on two cores. Needs root, and python with the package's libraries on the PATH.
# Exit status: 0 all passed, 1 a check failed, 77 it cannot run here.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
# shellcheck source=scripts/_env.sh
source "$root/scripts/_env.sh"
# shellcheck source=scripts/rehearse/_checks.sh
source "$root/scripts/rehearse/_checks.sh"

usage() { sed -n '2,/^set -euo/{/^set -euo/d;s/^# \{0,1\}//p}' "$0"; }
start_rehearsal "$@"
needs_programs "openssh-server openssh-client pdsh" /usr/sbin/sshd ssh ssh-keygen pdsh unshare
unshare --uts --mount --pid --fork true 2>/dev/null ||
  skip "expected to create namespaces (unshare --uts --mount --pid), which this container forbids"

# -- the hosts --------------------------------------------------------------------------------------------------------

mkdir -p "$work"/{bin,log,runs} /run/sshd
port="$(free_ports 1)"
printf '127.0.0.1 localhost\n127.0.0.2 host1\n127.0.0.3 host2\n' >"$work/hosts"
[[ -f $work/key ]] || ssh-keygen -q -t ed25519 -N "" -f "$work/key"
cat >"$work/ssh_config" <<END
Host host1 host2
  Port $port
  User root
  IdentityFile $work/key
  IdentitiesOnly yes
  StrictHostKeyChecking no
  UserKnownHostsFile $work/known_hosts
  LogLevel ERROR
Host host1
  HostName 127.0.0.2
Host host2
  HostName 127.0.0.3
END
printf '#!/bin/sh\nexec %s -F %s "$@"\n' "$(command -v ssh)" "$work/ssh_config" >"$work/bin/ssh"
chmod +x "$work/bin/ssh"
PATH="$work/bin:$PATH" # for the launcher, pdsh and DeepSpeed

declare -A hosts=()
start_host() { # start_host NAME ADDRESS: all its processes end with its first one
  cat >"$work/sshd_$1" <<END
Port $port
ListenAddress $2
HostKey $work/key
AuthorizedKeysFile $work/key.pub
PidFile none
UsePAM no
StrictModes no
PermitRootLogin prohibit-password
END
  unshare --uts --mount --pid --fork --kill-child --mount-proc bash -c \
    "hostname $1; mount --bind '$work/hosts' /etc/hosts; exec /usr/sbin/sshd -D -e -f '$work/sshd_$1'" >>"$work/log/$1.out" 2>&1 &
  hosts[$1]=$!
  disown # its death is no news
}
ranks_of() { # ranks_of HOST: process ids of its ranks, as this machine numbers them
  local child namespace process
  child="$(cat "/proc/${hosts[$1]}/task/${hosts[$1]}/children" 2>/dev/null)" || return 0
  namespace="$(readlink "/proc/${child%% *}/ns/pid")" || return 0
  for process in /proc/[0-9]*; do
    if [[ $(readlink "$process/ns/pid" 2>/dev/null) == "$namespace" ]] &&
      tr '\0' ' ' <"$process/cmdline" 2>/dev/null | grep -qE '^[^ ]*python[^ ]* -u [^ ]*scripts/train.py'; then
      echo "${process#/proc/}"
    fi
  done
}
end_hosts() {
  trap - ERR
  kill -KILL "${hosts[@]}" 2>/dev/null # unshare ignores SIGTERM; its child ends with it
  wait 2>/dev/null
}
trap end_hosts EXIT
start_host host1 127.0.0.2
start_host host2 127.0.0.3
answer() { [[ $(pdsh -S -R ssh -w host1,host2 hostname | sort | paste -sd' ') == "host1: host1 host2: host2" ]]; }
wait_until 30 answer || skip "the ssh daemons do not answer; see $work/log"
printf 'two hosts answer over pdsh: %s, %s\n' "$(ssh -V 2>&1)" "$(pdsh -V | head -n 1)"

# -- runs -------------------------------------------------------------------------------------------------------------

make_world
cd "$work" # not the checkout: the launchers must not depend on it
printf 'host1 slots=1\nhost2 slots=1\n' >hostfile
# What the documentation tells to write down for the other machines.
printf '%s\n' OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false GLOO_SOCKET_IFNAME=lo DS_ACCELERATOR=cpu >.deepspeed_env
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false DS_ACCELERATOR=cpu
# shellcheck disable=SC2016 # $HOME is to arrive as it is
prompt='<|im_start|>user\n<image>\nWhere is it? "{phrase}" isn'\''t $HOME<|im_end|>\n<|im_start|>assistant\n'
settings=(
  "data.root=$world" "cognition.prompt=\"${prompt//\"/\\\"}\"" training.log_every=1 training.save_every=2 training.eval_max_images=2
  training.images_per_device=2
)
options() { printf '%s\0' tiny-refcoco --output "$work/runs/$1" --set "${settings[@]}" "training.max_steps=$2"; }

trains() { # trains NAME STEPS COMMAND...: in the run folder NAME
  local name="$1" arguments
  mapfile -d '' arguments < <(options "$1" "$2")
  shift 2
  "$@" "${arguments[@]}" >"log/$name.log" 2>&1 || { echo "exit status $?: $(tail -n 1 "log/$name.log")" && return 1; }
}
same_losses() { python "$root/scripts/rehearse/losses.py" "runs/$1" runs/one; }

one() { trains one 4 "$root/scripts/launch_single_node.sh" && echo "4 steps"; }

several() {
  trains several 4 "$root/scripts/launch_multi_node.sh" hostfile || return 1
  [[ -d runs/several/checkpoint-4 ]] || { echo "no checkpoint-4" && return 1; }
  same_losses several
}
same_prompt() { # the whole config of both runs
  cmp runs/one/config.yaml runs/several/config.yaml && echo "the configs of both runs are equal"
}

torchrun_on() { # torchrun_on HOST: as a user types it in a shell of each machine
  local arguments command
  mapfile -d '' arguments < <(options torchrun 4)
  printf -v command '%q ' torchrun --nnodes 2 --nproc-per-node 1 --rdzv-id 1 --rdzv-backend c10d --rdzv-endpoint "host1:$rdzv_port" \
    "$root/scripts/train.py" --deepspeed "$root/ds_configs/zero2.json" --config "${arguments[@]}"
  # shellcheck disable=SC2029 # expanded here
  ssh "$1" "set -a; . $work/.deepspeed_env; export PATH='$PATH' PYTHONPATH='${PYTHONPATH:-}'; cd $work; $command" >"log/torchrun_$1.log" 2>&1
}
with_torchrun() {
  local first second
  rdzv_port="$(free_ports 1)"
  torchrun_on host1 & first=$!
  torchrun_on host2 & second=$!
  { wait "$first" && wait "$second"; } || { tail -qn 1 log/torchrun_host?.log | paste -sd' ' && return 1; }
  same_losses torchrun
}

endless() { # endless NAME: starts a run on both hosts in the background and waits for its second step
  local arguments
  mapfile -d '' arguments < <(options "$1" 10000)
  # With job control the launcher is in a process group of its own, and does not ignore SIGINT as background processes do.
  set -m
  "$root/scripts/launch_multi_node.sh" hostfile "${arguments[@]}" >"log/$1.log" 2>&1 &
  launcher=$!
  set +m
  wait_until 300 grep -q 'step 2 of' "log/$1.log" || { echo "no step: $(tail -n 1 "log/$1.log")" && return 1; }
  [[ -n $(ranks_of host1) && -n $(ranks_of host2) ]] || { echo "no rank on a host" && return 1; }
}
ended() { # ended SINCE: after how many seconds launcher and ranks were gone
  wait_until 60 launcher_is_gone || { echo "the launcher still runs after 60 s" && return 1; }
  local launcher_seconds=$((SECONDS - $1)) status=0
  wait "$launcher" || status=$?
  wait_until 60 no_ranks || { echo "the launcher ended after $launcher_seconds s, but ranks still run" && return 1; }
  echo "launcher after $launcher_seconds s with status $status; no rank left on either host after $((SECONDS - $1)) s"
  ((status != 0 && SECONDS - $1 <= 60))
}
launcher_is_gone() { ! kill -0 "$launcher" 2>/dev/null; }
no_ranks() { [[ -z $(ranks_of host1)$(ranks_of host2) ]]; }
dies() {
  endless dies || return 1
  kill -KILL "$(ranks_of host2 | head -n 1)"
  ended "$SECONDS"
}
interrupted() { # DeepSpeed's launcher then ends its processes on the hosts by the pattern of their command
  endless interrupted || return 1
  kill -INT -- "-$launcher"
  ended "$SECONDS"
}

check "one machine, two ranks: scripts/launch_single_node.sh" one
check "two hosts: scripts/launch_multi_node.sh hostfile; losses equal one machine's" several
check "arguments with blanks, quotes, < and \$ arrive unchanged" same_prompt
check "torchrun --nnodes 2 over ssh; losses equal one machine's" with_torchrun
check "a rank on one host is killed" dies
check "Ctrl-C on the first machine" interrupted
finish || exit 1
[[ -z $is_temporary ]] || { cd / && end_hosts && trap - EXIT && rm -rf "$work"; }
