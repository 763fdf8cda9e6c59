"""A run -> a Hugging Face directory that plain transformers loads: the writer, the gate that
compares it with what was trained, its model card, exports in the background of a run.
"""
