"""Benchmarks of the parts whose speed and memory are the point: `python -m casa_train.bench`.

One file a benchmark; `__main__.py` lists them. A benchmark prints a table and states its method.
"""
