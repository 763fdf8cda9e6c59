"""Whole files, tensors in files, log lines, caches and the chatter of libraries."""
