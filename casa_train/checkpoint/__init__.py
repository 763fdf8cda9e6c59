"""Checkpoints (sharded, resumable) and exports (Hugging Face directories).

`manager.py` owns the commit: a checkpoint exists completely or not at all. `export.py` writes the
directory that plain transformers loads.
"""
