"""Checkpoints, sharded and resumable. `manager.py` owns the commit: one exists completely or not at
all. `slices.py` and `frozen.py` hold weights and optimiser state by parameter name, for any number
of ranks; `resume.py` says whether a run may go on from one, and does.
"""
