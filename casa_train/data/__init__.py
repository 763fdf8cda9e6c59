"""Samples, shards, plans and packed batches.

    recipe -> shards + index -> mixture -> plan (packs) -> materialize -> PackedBatch -> loader

    published files -> row groups -> lanes (packs) -> PackedBatch -> stream

A split is tar shards with an index (`shards.py`, `shard_index.py`); rows of published datasets
become `sample.Sample` by a schema (`schemas.py`, `video_schemas.py`, over `conversation.py`).
`templates.py` finds the chat template that is in force, `tokens.py` counts tokens under it.
`ratings.py` filters turns from the index, `overlap.py` knows which published subsets hold the same
samples.

The order of packs is a pure function of configuration, seed and index (`plan.py`); workers only
turn a pack descriptor into tensors (`materialize.py`). The folder imports `casa_train.modeling` for
one thing: the processor, so that training and inference share the chat template and the image code.
"""
