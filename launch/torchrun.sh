#!/usr/bin/env bash
# One machine, one process a GPU (or NPROC processes on the CPU):
#   launch/torchrun.sh +experiment=demo name=two
# SIGTERM or SIGUSR1 to this process: the run saves and leaves; torchrun's own code is then 1.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}  # paths stay relative to the caller's folder
gpus=$(command -v nvidia-smi >/dev/null && nvidia-smi --list-gpus | wc -l || echo 0)
processes=${NPROC:-$(( gpus > 0 ? gpus : 2 ))}
python=$root/.venv/bin/python
[ -x "$python" ] || python=python
# After a signal torchrun kills its processes in 30 seconds, which is short for a large checkpoint.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}
options=(--standalone --nproc_per_node="$processes")
# Older versions pass on SIGTERM, but die of SIGUSR1 and cannot be told otherwise.
if grep -q signals-to-handle <<<"$("$python" -m torch.distributed.run --help)"; then
    options+=("--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")
fi
exec "$python" -m torch.distributed.run "${options[@]}" -m casa_train "$@"
