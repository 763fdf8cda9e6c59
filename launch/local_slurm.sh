#!/usr/bin/env bash
# A SLURM of two nodes, n0 and n1, on this machine, to try launch/ without a cluster:
#   launch/local_slurm.sh start|stop|status
#   eval "$(launch/local_slurm.sh env)"    # points sbatch, squeue, ... of this shell at it
#
# Needs the packages slurm-wlm and munge; no systemd, no root, nothing outside its directory
# (CASA_SLURM_DIR) and its ports (CASA_SLURM_PORT and the two above it).
#
# The partition `low` can be pre-empted by jobs in `high`, as on a shared cluster.
set -euo pipefail

state=${CASA_SLURM_DIR:-/tmp/casa-slurm-$(id -u)}
port=${CASA_SLURM_PORT:-17170}
export SLURM_CONF=$state/slurm.conf
PATH=$PATH:/usr/sbin:/sbin

fail() {
    echo "local_slurm.sh: $1" >&2
    exit 1
}

# Whether the daemon of a pid file lives.
alive() {
    [ -s "$1" ] && kill -0 "$(cat "$1")" 2>/dev/null
}

write_configuration() {
    local user host cpus
    user=$(id -un)
    host=$(hostname -s)
    cpus=$(nproc)
    cat >"$SLURM_CONF" <<CONF
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
# A requeued job waits until credentials of its last run are void: 2 minutes by default.
AuthInfo=socket=$state/munge.socket,cred_expire=5
StateSaveLocation=$state/controller
SlurmdSpoolDir=$state/spool-%n
SlurmctldPidFile=$state/slurmctld.pid
SlurmdPidFile=$state/slurmd-%n.pid
SlurmctldLogFile=$state/slurmctld.log
SlurmdLogFile=$state/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,sched_min_interval=0
SlurmdParameters=config_overrides
KillWait=10
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n0 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 1)) CPUs=$cpus
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 2)) CPUs=$cpus
PartitionName=low Nodes=n0,n1 Default=YES PriorityTier=1 GraceTime=60 MaxTime=INFINITE
PartitionName=high Nodes=n0,n1 PriorityTier=2 PreemptMode=OFF MaxTime=INFINITE
CONF
}

start() {
    local program
    for program in munged slurmctld slurmd sbatch; do
        command -v "$program" >/dev/null ||
            fail "$program not found; install the packages slurm-wlm and munge"
    done
    ! alive "$state/slurmctld.pid" || fail "already running in $state; stop it first"
    mkdir -p "$state"/{controller,spool-n0,spool-n1}
    chmod 755 "$state" # munged wants to know that nobody else writes here
    write_configuration
    [ -s "$state/munge.key" ] || (umask 077 && head -c 1024 /dev/urandom >"$state/munge.key")
    munged --key-file="$state/munge.key" --socket="$state/munge.socket" \
        --pid-file="$state/munged.pid" --log-file="$state/munged.log" \
        --seed-file="$state/munged.seed"
    slurmctld -c # without memories of an earlier start
    slurmd -N n0
    slurmd -N n1
    for _ in $(seq 60); do
        if [ "$(sinfo --noheader --partition=low --states=idle --format=%D 2>/dev/null)" = 2 ]; then
            status
            return
        fi
        sleep 0.5
    done
    tail -n 5 "$state"/*.log >&2
    stop
    fail "the two nodes did not come up in 30 s; the ends of the logs stand above"
}

stop() {
    local name file
    if alive "$state/slurmctld.pid"; then
        scancel --user="$(id -un)" || true
        for _ in $(seq 30); do # until the jobs' processes are gone
            [ -n "$(squeue --noheader 2>/dev/null)" ] || break
            sleep 0.5
        done
    fi
    for name in slurmd-n0 slurmd-n1 slurmctld munged; do
        file=$state/$name.pid
        if alive "$file"; then kill "$(cat "$file")"; fi
    done
    for name in slurmd-n0 slurmd-n1 slurmctld munged; do
        for _ in $(seq 30); do
            alive "$state/$name.pid" || break
            sleep 0.5
        done
        ! alive "$state/$name.pid" || fail "$name does not end; its pid is in $state/$name.pid"
    done
    rm -rf "$state"
}

status() {
    alive "$state/slurmctld.pid" || fail "not running; start it with: launch/local_slurm.sh start"
    sinfo --Node --format="%N %P %t %c CPUs"
    squeue --format="%i %P %j %T %M %R"
}

case ${1:-} in
    start) start ;;
    stop) stop ;;
    status) status ;;
    env) echo "export SLURM_CONF=$SLURM_CONF CASA_MASTER_ADDR=127.0.0.1" ;;
    *) fail "expected start, stop, status or env, found '${1:-}'" ;;
esac
