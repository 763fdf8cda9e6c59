"""Whole files, tensors and their precisions, log lines, caches and the chatter of libraries."""
