"""Benchmarks of the parts whose speed and memory are the point: `python -m casa_train.bench`.

One file a benchmark; `__main__.py` lists them. A benchmark prints a table and states its method.
"""

import os

# Read once, when torch is imported: its profiler warns of every tensor from before it began.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
