"""The only room with deepspeed: a configuration's model with its first values under the sharding
engine (`starting.py`), its blocks compiled or not (`compiling.py`), and ZeRO's state in and out of
checkpoints by parameter name.
"""
