#!/usr/bin/env bash
# Are these nodes fit for a run? Minutes of checks instead of a night of guessing, in an allocation like
# the run's own:
#   sbatch launch/preflight.sh RUN_DIR [DATA_DIR ...]         # from the repository's root
#   salloc --nodes=4 ...  then  launch/preflight.sh RUN_DIR [DATA_DIR ...]
# Every node: GPUs (count, memory errors, memory in use), the run directory (shared by all nodes, free space,
# write speed), data directories (read speed). Then an all-reduce within every node and over all tasks.
# Leaves with 1 and the names of the nodes that failed; sbatch --exclude takes them.
#
#   CASA_MIN_FREE_GB    free space that the run directory needs (200)
#   CASA_WRITE_MB       size of the write and read tests (512)
#   CASA_REDUCE_MB      size of the all-reduce (1024 on GPUs, 16 on CPUs)
#   CASA_PYTHON, CASA_MASTER_ADDR    as in slurm.sbatch
#
#SBATCH --job-name=casa_preflight
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=00:20:00
#SBATCH --output=casa_preflight-%j.out
set -euo pipefail

node=${SLURMD_NODENAME:-$(hostname -s)}
failures=0

ok() {
    echo "$node: ok: $1"
}

bad() {
    echo "$node: FAILED: $1"
    failures=$((failures + 1))
}

check_gpus() {
    local expected=${SLURM_GPUS_ON_NODE:-} before=$failures count=0 fields lines model index name used errors
    if ! command -v nvidia-smi >/dev/null; then
        if [ -n "$expected" ]; then
            bad "$expected GPUs are allocated, but there is no nvidia-smi"
        else
            ok "no GPUs allocated"
        fi
        return
    fi
    fields=index,name,memory.used,ecc.errors.uncorrected.volatile.total
    if ! lines=$(timeout 60 nvidia-smi --query-gpu="$fields" --format=csv,noheader,nounits 2>&1); then
        bad "nvidia-smi: $(tail -n 1 <<<"$lines")"
        return
    fi
    while IFS=, read -r index name used errors; do
        count=$((count + 1)) model=$name
        used=${used// /} errors=${errors// /}
        # Some GPUs say [N/A].
        if [[ $errors =~ ^[0-9]+$ && $errors -gt 0 ]]; then
            bad "GPU $index has $errors uncorrected memory errors; it needs a reset or a repair"
        fi
        if [[ $used =~ ^[0-9]+$ && $used -gt 2048 ]]; then
            bad "GPU $index has $used MiB in use: somebody else's process, or one that was left behind"
        fi
    done <<<"$lines"
    # GPUs that cannot remap rows refuse the question.
    if lines=$(timeout 60 nvidia-smi --query-remapped-rows=remapped_rows.pending,remapped_rows.failure \
        --format=csv,noheader 2>/dev/null) && grep -qE 'Yes|1' <<<"$lines"; then
        bad "a GPU has memory rows to remap (pending or failed); it needs a reset or a repair"
    fi
    if [ -n "$expected" ] && [ "$count" != "$expected" ]; then
        bad "$count GPUs are visible, $expected are allocated"
    fi
    [ "$failures" != "$before" ] || ok "$count x$model"
}

# rate MEGABYTES SECONDS.NANOSECONDS: in MB/s
rate() {
    awk -v mb="$1" -v seconds="$2" 'BEGIN { printf "%.0f MB/s", mb / (seconds > 0.001 ? seconds : 0.001) }'
}

# elapsed BEGAN: seconds since then
elapsed() {
    awk -v began="$1" -v now="$(date +%s.%N)" 'BEGIN { print now - began }'
}

check_run_directory() {
    local directory=$1 token=$2 size=${CASA_WRITE_MB:-512} need=${CASA_MIN_FREE_GB:-200} free file began out
    if [ ! -e "$token" ]; then
        bad "$directory is not the directory that the first node sees; it must be shared by all nodes"
        return
    fi
    free=$(df --output=avail --block-size=1G "$directory" | tail -n 1 | tr -d ' ')
    if [ "$free" -lt "$need" ]; then
        bad "$directory has $free GB free, expected $need (CASA_MIN_FREE_GB)"
    fi
    file=$directory/.preflight-write-$node-$$
    began=$(date +%s.%N)
    if out=$(dd if=/dev/zero of="$file" bs=1M count="$size" conv=fsync 2>&1); then
        ok "$directory: $free GB free, writes $(rate "$size" "$(elapsed "$began")")"
    else
        bad "$directory cannot be written: $(grep -m 1 'dd:' <<<"$out")"
    fi
    rm -f "$file"
}

check_data_directory() {
    local directory=$1 size=${CASA_WRITE_MB:-512} file began bytes
    # Another file on every node where there are enough, so that no cache serves two of them. Of a tree
    # with millions of files the first thousand will do.
    file=$(find -L "$directory" -type f -size +0 2>/dev/null | head -n 1000 |
        awk -v skip="${SLURM_NODEID:-0}" '{ name[NR] = $0 } END { if (NR) print name[skip % NR + 1] }') || true
    if [ -z "$file" ]; then
        bad "$directory is not there, or holds no file"
        return
    fi
    began=$(date +%s.%N)
    if bytes=$(head -c "${size}M" "$file" | wc -c); then
        ok "$directory: reads $(rate "$(awk "BEGIN { print $bytes / 1e6 }")" "$(elapsed "$began")")"
    else
        bad "$file cannot be read"
    fi
}

# One task a node runs this.
check_node() {
    local token=$1 run_dir=$2
    shift 2
    check_gpus
    check_run_directory "$run_dir" "$token"
    for directory in "$@"; do
        check_data_directory "$directory"
    done
    [ "$failures" = 0 ]
}

if [ "${1:-}" = --node ]; then
    shift
    check_node "$@"
    exit
fi

if [ $# -lt 1 ] || [ -z "${SLURM_JOB_ID:-}" ]; then
    echo "usage: sbatch launch/preflight.sh RUN_DIR [DATA_DIR ...]" >&2
    exit 2
fi
launch=$PWD/launch # sbatch runs a copy of this file
[ -f "$launch/all_reduce.py" ] || launch=$(cd "$(dirname "$0")" && pwd)
python=${CASA_PYTHON:-.venv/bin/python}
[ -x "$python" ] || python=python3
MASTER_ADDR=${CASA_MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
MASTER_PORT=$((15000 + SLURM_JOB_ID % 15000))
export MASTER_ADDR MASTER_PORT
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then
    export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
fi

mkdir -p "$1"
log=$(mktemp)
token=$1/.preflight-$SLURM_JOB_ID
touch "$token"
trap 'rm -f "$token" "$log"' EXIT
status=0
srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
    bash "$launch/preflight.sh" --node "$token" "$@" 2>&1 | tee "$log" || status=1
if [ "$status" = 0 ]; then
    srun --kill-on-bad-exit=1 "$python" "$launch/all_reduce.py" 2>&1 | tee --append "$log" || status=1
fi
if [ "$status" != 0 ]; then
    failed=$(sed -n 's/^\([^ :]*\): FAILED: .*/\1/p' "$log" | sort -u | paste -sd ,)
    echo "preflight FAILED${failed:+ on $failed; sbatch --exclude=$failed leaves them out}"
    exit 1
fi
echo "preflight passed on $SLURM_JOB_NODELIST"
