#!/bin/bash
# A SLURM of one machine, in one folder, for `pytest -m slurm`.
#
#   tests/slurm/setup.sh start FOLDER    installs Debian's slurm-wlm and munge if they are missing, and starts them
#   tests/slurm/setup.sh stop FOLDER     stops them
#
# As root. Afterwards `export SLURM_CONF=FOLDER/slurm.conf`. Nothing outside FOLDER is written, apart from the two
# packages: the key, the sockets, the state and the logs are in it. The path must be short (a socket's has <= 107
# characters). Two nodes, both of them this machine, one job a node. The partitions low (default; no time to leave) and
# patient (60 s) are preempted by high and requeued, all three on the first node; pair has both nodes.
set -euo pipefail

command=${1:?start or stop}
folder=$(realpath -m "${2:?a folder}")

stop() {
  local name pid
  if [[ -f $folder/slurmctld.pid ]]; then  # jobs would outlive their cluster
    export SLURM_CONF=$folder/slurm.conf
    squeue --noheader --format=%A 2> /dev/null | xargs --no-run-if-empty timeout 10 scancel || true
    for _ in {1..45}; do
      [[ -n $(timeout 10 squeue --noheader 2> /dev/null) ]] || break
      sleep 1
    done
  fi
  for name in slurmd.one slurmd.two slurmctld munged; do
    [[ -f $folder/$name.pid ]] || continue
    pid=$(< "$folder/$name.pid")
    kill "$pid" 2> /dev/null || true
    for _ in {1..100}; do
      # A container may have nobody to bury the dead.
      grep -qsE '^State:[[:space:]]+[^Z]' "/proc/$pid/status" || break
      sleep 0.1
    done
    kill -9 "$pid" 2> /dev/null || true
    rm -f "$folder/$name.pid"
  done
}

install() {
  if ! command -v slurmctld slurmd munged > /dev/null; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurm-wlm munge
  fi
}

configure() {
  local port=${SLURM_TEST_PORT:-16817} host
  host=$(hostname -s)
  mkdir -p "$folder/state"
  dd if=/dev/urandom of="$folder/munge.key" bs=128 count=1 status=none
  chmod 600 "$folder/munge.key"
  cat > "$folder/slurm.conf" << CONF
ClusterName=one
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort=$port
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool.%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.%n.log
# A container has neither systemd nor cgroups of its own.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
# The node is whatever this machine is, and comes back by itself.
SlurmdParameters=config_overrides
ReturnToService=2
SelectType=select/cons_tres
SchedulerParameters=sched_interval=5,bf_interval=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=30
GresTypes=gpu
NodeName=one NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 1)) CPUs=$(nproc) Gres=gpu:2
NodeName=two NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 2)) CPUs=$(nproc) Gres=gpu:2
PartitionName=low Nodes=one OverSubscribe=EXCLUSIVE Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=0
PartitionName=patient Nodes=one OverSubscribe=EXCLUSIVE PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=high Nodes=one OverSubscribe=EXCLUSIVE PriorityTier=2 PreemptMode=OFF
PartitionName=pair Nodes=one,two OverSubscribe=EXCLUSIVE PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
CONF
  # The scripts ask for GPUs, and no job of the tests touches one: any two devices will do.
  printf 'Name=gpu File=%s\n' /dev/null /dev/zero > "$folder/gres.conf"
}

start() {
  export SLURM_CONF=$folder/slurm.conf
  munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munged.pid" \
    --seed-file="$folder/munge.seed" --log-file="$folder/munged.log"
  slurmctld -c
  slurmd -N one
  slurmd -N two
  for _ in {1..120}; do
    if [[ $(sinfo --noheader --partition=pair --format=%D,%T 2> /dev/null) == 2,idle ]]; then
      sinfo --version
      return
    fi
    sleep 0.5
  done
  sinfo || true
  tail -n 20 "$folder"/*.log
  return 1
}

case $command in
  start)
    install
    stop
    configure
    start
    ;;
  stop) stop ;;
  *)
    echo "error: start or stop, got $command" >&2
    exit 2
    ;;
esac
