"""The only room with deepspeed: the sharded model with its optimiser, and ZeRO's state in and out
of checkpoints by parameter name.
"""
