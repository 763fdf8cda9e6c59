"""One optimiser step, the loop around it (`loop.py`), and the hooks that watch it (`hooks.py`):
audit, records and attempts (`reporting.py`), watchdog, garbage collection, memory probe, stopping,
steps taken apart (`step_profile.py`). They see engine, loader and checkpoints as protocols
(`state.py`); `train.build_run` has the list.
"""
