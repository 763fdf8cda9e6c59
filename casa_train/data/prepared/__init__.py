"""Prepared splits: tar shards with an index of lengths, and the plan that packs them, a pure
function of configuration, seed and index.
"""
