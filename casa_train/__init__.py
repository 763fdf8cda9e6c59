"""casa_train: training cross-attention vision-language models (CASA, arXiv 2512.19535)."""

import os

__version__ = "0.1.0"

# Threads of torch's OpenMP pool wait for each other several times an operation, and unless told
# otherwise they spin meanwhile, on the very core that a thread they wait for may want: on a machine
# with one busy process more than it has cores, steps of small models took ten times as long. So
# they sleep, in every command, unless the environment says something else. The runtimes (GNU's in
# torch's wheels, LLVM's and Intel's elsewhere) read this once, when torch is imported, and every
# command imports this package first.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
