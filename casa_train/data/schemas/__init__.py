"""Rows of published datasets and what was said in them -> `Sample`."""
