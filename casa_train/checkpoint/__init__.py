"""Checkpoints (sharded, resumable) and exports (Hugging Face directories).

`manager.py` owns the commit: a checkpoint exists completely or not at all. `slices.py` writes and
reads weights and optimiser state by parameter name, for any number of ranks. `export.py` writes the
directory that plain transformers loads.
"""
