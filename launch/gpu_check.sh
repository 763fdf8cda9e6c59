#!/usr/bin/env bash
# Does everything run on this machine's GPU, how fast, and in how much memory? At most eight minutes:
#   PYTHON=python launch/gpu_check.sh [OUT]        # an interpreter that has the packages
#   launch/gpu_check.sh --cpu-rehearsal            # every stage tiny on a CPU
# All else, and --help, is in gpu_check.py.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
python=${PYTHON:-python3}
"$python" -c '
import importlib.util, sys
needed = "torch", "transformers", "deepspeed", "pyarrow", "hydra", "pytest", "hypothesis"
missing = [name for name in needed if importlib.util.find_spec(name) is None]
if missing:
    print(f"error: {sys.executable} has no {missing}: name one with the packages: PYTHON=...", file=sys.stderr)
    sys.exit(2)'
exec "$python" -m launch.gpu_check "$@"
