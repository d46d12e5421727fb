#!/usr/bin/env bash
# Runs scripts/slurm.sbatch under a real SLURM on this machine: a controller and two node daemons, started for the purpose.
#
# usage: scripts/rehearse/slurm.sh [--install] [--world DIR] [--only REGEX] [WORK]
#
#   --install    first install Debian's packages slurmctld, slurmd, slurm-client and munge
#   --world DIR  a data root (default: a small synthetic world is made)
#   --only REGEX only the checks whose names match
#   WORK         folder for configuration, logs and runs (default: a temporary one, which is deleted if all passed)
#
# What is rehearsed: two nodes, each with a stand-in for a GPU; a job array; scontrol requeue in the middle of a run;
# --signal=USR1@60 at the end of the time limit; a node that dies; a node that freezes. Both "nodes" are namespaces of this machine
# and share its disk. The jobs train tiny-refcoco for some steps. Takes about ten minutes on two cores.
# Needs root, and python with the package's libraries on the PATH.
# Exit status: 0 all passed, 1 a check failed, 77 it cannot run here.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
# shellcheck source=scripts/_env.sh
source "$root/scripts/_env.sh"
# shellcheck source=scripts/rehearse/_checks.sh
source "$root/scripts/rehearse/_checks.sh"

usage() { sed -n '2,/^set -euo/{/^set -euo/d;s/^# \{0,1\}//p}' "$0"; }

start_rehearsal "$@"
needs_programs "slurmctld slurmd slurm-client munge" slurmctld slurmd sbatch munged unshare
unshare --uts --mount true 2>/dev/null || skip "expected to create namespaces (unshare --uts --mount), which this container forbids"

# -- the cluster ------------------------------------------------------------------------------------------------------

mkdir -p "$work"/{run,log,state,dev,jobs,runs}
read -r controller_port port_1 port_2 <<<"$(free_ports 3)"
printf '127.0.0.1 localhost node1\n127.0.0.2 node2\n' >"$work/hosts"
has_gres=yes
for i in 0 1; do mknod "$work/dev/gpu$i" c 1 3 2>/dev/null || [[ -c $work/dev/gpu$i ]] || has_gres=""; done
cat >"$work/slurm.conf" <<END
ClusterName=rehearsal
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=root
SlurmctldPort=$controller_port
AuthType=auth/munge
AuthInfo=socket=$work/run/munge.socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerParameters=batch_sched_delay=1,sched_interval=2,bf_interval=2
ReturnToService=2
SlurmdTimeout=10
KillWait=30
SlurmdParameters=config_overrides
CommunicationParameters=NoAddrCache,NoInAddrAny,NoCtldInAddrAny
StateSaveLocation=$work/state
SlurmdSpoolDir=$work/spool.%n
SlurmctldPidFile=$work/run/slurmctld.pid
SlurmdPidFile=$work/run/slurmd.%n.pid
SlurmctldLogFile=$work/log/slurmctld.log
SlurmdLogFile=$work/log/slurmd.%n.log
GresTypes=gpu
NodeName=node1 NodeHostname=node1 NodeAddr=127.0.0.1 Port=$port_1 CPUs=8 RealMemory=2000${has_gres:+ Gres=gpu:2}
NodeName=node2 NodeHostname=node2 NodeAddr=127.0.0.2 Port=$port_2 CPUs=8 RealMemory=2000${has_gres:+ Gres=gpu:2}
PartitionName=main Nodes=node1,node2 Default=YES MaxTime=INFINITE State=UP
END
[[ -z $has_gres ]] || printf 'NodeName=node[1-2] Name=gpu File=%s/dev/gpu[0-1]\n' "$work" >"$work/gres.conf"
export SLURM_CONF="$work/slurm.conf"

declare -A daemons=()
start_node() { # start_node NODE: its daemon, in a namespace whose host name is NODE
  mkdir -p "$work/spool.$1"
  unshare --uts --mount bash -c "hostname $1; mount --bind '$work/hosts' /etc/hosts; exec slurmd -D -N $1" >>"$work/log/$1.out" 2>&1 &
  daemons[$1]=$!
  disown # its death is no news
}

node_pids() { # node_pids NODE: every process in the namespace of its daemon
  local namespace process
  namespace="$(readlink "/proc/${daemons[$1]}/ns/uts" 2>/dev/null)" || return 0
  [[ $namespace != "$(readlink /proc/$$/ns/uts)" ]] || return 0
  for process in /proc/[0-9]*; do
    if [[ $(readlink "$process/ns/uts" 2>/dev/null) == "$namespace" ]]; then echo "${process#/proc/}"; fi
  done
}

signal_node() { # signal_node SIGNAL NODE
  local pids
  mapfile -t pids < <(node_pids "$2")
  ((${#pids[@]} == 0)) || kill "-$1" "${pids[@]}" 2>/dev/null || true
}

end_cluster() {
  trap - ERR
  scancel --user root >/dev/null 2>&1
  for node in node1 node2; do
    signal_node KILL "$node"
  done
  kill "${daemons[controller]}" "${daemons[munge]}" 2>/dev/null
  wait 2>/dev/null
}
trap end_cluster EXIT

dd if=/dev/urandom of="$work/run/munge.key" bs=1024 count=1 status=none
chmod 400 "$work/run/munge.key"
munged --foreground --force --socket="$work/run/munge.socket" --key-file="$work/run/munge.key" \
  --log-file="$work/log/munge.log" --pid-file="$work/run/munge.pid" --seed-file="$work/run/munge.seed" >>"$work/log/munge.out" 2>&1 &
daemons[munge]=$!
wait_until 20 test -S "$work/run/munge.socket" || skip "munged did not start; see $work/log/munge.log"
slurmctld -D >>"$work/log/slurmctld.out" 2>&1 &
daemons[controller]=$!
start_node node1
start_node node2
are_idle() { [[ $(sinfo --noheader --Node --format %t | sort | uniq -c | tr -s ' ') == " 2 idle" ]]; }
wait_until 60 are_idle || skip "SLURM did not start on this machine; see $work/log"
printf 'SLURM %s: %s\n' "$(sinfo --version)" "$(sinfo --noheader --format '%D nodes %t')"

# -- jobs -------------------------------------------------------------------------------------------------------------

cd "$root" # where scripts/slurm.sbatch is submitted
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-lo}"
make_world
settings=("data.root=$world" training.log_every=1 training.eval_max_images=2 training.images_per_device=2)

submit() { # submit NAME STEPS SAVE_EVERY [SBATCH_OPTION...] [-- OPTION...]: prints the id of the job
  local name="$1" steps="$2" save_every="$3" sbatch_options=()
  shift 3
  while (($#)) && [[ $1 != -- ]]; do sbatch_options+=("$1") && shift; done
  if (($#)); then shift; fi
  sbatch --parsable --output "$work/jobs/$name.log" --cpus-per-task 2 --nodes 2 "${sbatch_options[@]}" \
    scripts/slurm.sbatch tiny-refcoco --output "$work/runs/$name" "$@" \
    --set "${settings[@]}" "training.max_steps=$steps" "training.save_every=$save_every"
}
state_of() { scontrol show job "$1" -o 2>/dev/null | grep -o 'JobState=[A-Z_]*' | cut -d= -f2 | sort -u | paste -sd,; }
is_state() { [[ $(state_of "$1") =~ ^($2)$ ]]; }
log_has() { grep -qE "$2" "$work/jobs/$1.log" 2>/dev/null; }
last_words() { grep -vE '^\+|^$' "$work/jobs/$1.log" | tail -n 1 | cut -c 1-160; }
on_cpu=(--gpus-per-node 0)

completes() { # completes NAME JOB
  wait_until 600 is_state "$2" 'COMPLETED|FAILED|CANCELLED|TIMEOUT|NODE_FAIL' || true
  is_state "$2" COMPLETED || { echo "job is $(state_of "$2"): $(last_words "$1")" && return 1; }
}

two_nodes() {
  local job options=("${on_cpu[@]}") more=(--ranks-per-node 1)
  if [[ -n $has_gres ]]; then options=(--gpus-per-node 1) more=(); fi
  job="$(submit straight 6 2 "${options[@]}" -- "${more[@]}")"
  completes straight "$job" && [[ -d $work/runs/straight/checkpoint-6 ]] && echo "6 steps, one rank on each node"
}

job_array() {
  local job
  job="$(submit seed-%a 3 3 "${on_cpu[@]}" --nodes 1 --array 1-2 -- --ranks-per-node 1 --set training.seed=%a)"
  wait_until 600 is_state "$job" 'COMPLETED|FAILED'
  [[ -d $work/runs/seed-1/checkpoint-3 && -d $work/runs/seed-2/checkpoint-3 ]] || { echo "a run is missing" && return 1; }
  if python scripts/rehearse/losses.py "$work"/runs/seed-{1,2} >/dev/null; then echo "equal losses of two seeds" && return 1; fi
  echo "two tasks, two seeds, two run folders"
}

resumed_equal() { # resumed_equal NAME JOB: the requeued job completes, and its losses are those of the run that went straight on
  wait_until 120 is_state "$2" PENDING || { echo "not requeued: job is $(state_of "$2")" && return 1; }
  scontrol update "jobid=$2" starttime=now
  completes "$1" "$2" || return 1
  resumed_from "$1"
}
resumed_from() { grep -oE 'resuming from .*/checkpoint-[0-9]+' "$work/jobs/$1.log" | sed 's|resuming from .*/|resumed from |' | tail -n 1 | grep .; }

requeue() {
  local job resumed
  job="$(submit requeued 6 2 "${on_cpu[@]}" -- --ranks-per-node 1 --set data.num_workers=1)" # loader workers get SIGTERM too
  wait_until 300 test -d "$work/runs/requeued/checkpoint-2" || { echo "no checkpoint: $(last_words requeued)" && return 1; }
  scontrol requeue "$job"
  resumed="$(resumed_equal requeued "$job")" || { echo "$resumed" && return 1; }
  printf '%s; %s\n' "$resumed" "$(python scripts/rehearse/losses.py "$work"/runs/{requeued,straight})"
  python scripts/rehearse/losses.py "$work"/runs/{requeued,straight} >/dev/null
}

time_limit() { # 10,000 steps do not end before the limit; nothing but the signal makes the run save
  local job started saved
  job="$(submit limited 10000 10000 "${on_cpu[@]}" --time "$limit_minutes" --signal USR1@60 -- --ranks-per-node 1)"
  wait_until 60 is_state "$job" RUNNING
  started=$SECONDS
  wait_until $((limit_minutes * 60 + 30)) is_state "$job" 'PENDING|TIMEOUT|FAILED|COMPLETED'
  is_state "$job" PENDING || { echo "job is $(state_of "$job"): $(last_words limited)" && return 1; }
  saved=("$work"/runs/limited/checkpoint-*)
  [[ -d ${saved[0]} ]] || { echo "requeued after $((SECONDS - started)) s, but nothing was saved" && return 1; }
  local seconds=$((SECONDS - started))
  scontrol update "jobid=$job" starttime=now
  wait_until 300 log_has limited 'resuming from' || { echo "saved ${saved[0]##*/}, but not resumed" && return 1; }
  echo "saved ${saved[0]##*/} and requeued after $seconds s of $((limit_minutes * 60)); $(resumed_from limited)"
}
limit_minutes=4

lost_node() { # lost_node NAME SIGNAL: how long until the job has ended and the ranks of the other node are gone
  local job hit
  job="$(submit "$1" 10000 10000 "${on_cpu[@]}" --no-requeue -- --ranks-per-node 1)"
  wait_until 300 log_has "$1" 'step 2 of' || { echo "no step: $(last_words "$1")" && return 1; }
  signal_node "$2" node2
  hit=$SECONDS
  wait_until 90 is_state "$job" 'FAILED|NODE_FAIL|CANCELLED|COMPLETING' || { echo "still $(state_of "$job") after 90 s" && return 1; }
  local state seconds=$((SECONDS - hit))
  state="$(state_of "$job")"
  wait_until 60 has_no_rank node1 || { echo "$state after $seconds s, but ranks of node1 still run" && return 1; }
  echo "$state after $seconds s; no rank left on the other node after $((SECONDS - hit)) s"
  ((seconds <= 60))
}
has_no_rank() { # has_no_rank NODE
  local process
  for process in $(node_pids "$1"); do
    if tr '\0' ' ' <"/proc/$process/cmdline" 2>/dev/null | grep -q scripts/train.py; then return 1; fi
  done
}
restart_node() {
  signal_node KILL "$1"
  start_node "$1"
}

rehearse() { # rehearse NAME COMMAND...: a check on two idle nodes
  wait_until 90 are_idle || true
  check "$@"
  scancel --user root
}
how=(--ranks-per-node 1)
[[ -z $has_gres ]] || how=(--gpus-per-node 1)
rehearse "two nodes: ${how[*]}" two_nodes
rehearse "job array: --output .../seed-%a --set training.seed=%a" job_array
rehearse "scontrol requeue in the middle: losses equal those of the straight run" requeue
rehearse "--time $limit_minutes --signal=USR1@60 saves and requeues" time_limit
rehearse "a node dies (all its processes are killed)" lost_node dies KILL
restart_node node2
rehearse "a node freezes (all its processes are stopped)" lost_node freezes STOP
signal_node KILL node2
finish || exit 1
[[ -z $is_temporary ]] || { end_cluster && trap - EXIT && rm -rf "$work"; }
