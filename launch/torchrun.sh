#!/usr/bin/env bash
# One machine, one process a GPU (or NPROC processes on the CPU):
#   launch/torchrun.sh +experiment=demo name=two
set -euo pipefail
cd "$(dirname "$0")/.."
gpus=$(command -v nvidia-smi >/dev/null && nvidia-smi --list-gpus | wc -l || echo 0)
processes=${NPROC:-$(( gpus > 0 ? gpus : 2 ))}
python=.venv/bin/python
[ -x "$python" ] || python=python
exec "$python" -m torch.distributed.run --standalone --nproc_per_node="$processes" -m casa_train "$@"
