"""Recipes that turn a dataset, published or rendered here, into shards with an index."""
