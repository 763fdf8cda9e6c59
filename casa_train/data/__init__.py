"""Rows of datasets -> samples -> packs -> batches, on any number of ranks. Prepared data goes by
shards, an index and a plan (`prepared/`), published files by row groups and lanes (`stream/`), and
`build.py` makes either out of a configuration. The order of packs follows from configuration, seed
and data alone.
"""
