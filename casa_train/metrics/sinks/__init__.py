"""Where the record of a step goes: metrics.jsonl, the console, TensorBoard, wandb.

None of them can end a training: what fails is switched off with one warning, except metrics.jsonl,
whose lines wait for room on the disk.
"""
