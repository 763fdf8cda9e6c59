"""Samples, shards, plans and packed batches.

    recipe -> shards + index -> mixture -> plan (packs) -> materialize -> PackedBatch -> loader

The order of packs is a pure function of configuration, seed and index (`plan.py`); workers only
turn a pack descriptor into tensors (`materialize.py`). The folder imports `casa_train.modeling` for
one thing: the processor, so that training and inference share the chat template and the image code.
"""
