"""YAML in, one checked configuration out: the dataclasses with every field, its default, its bounds
and its meaning; composing `conf/` onto them; paths and overrides as a user types them.
"""
