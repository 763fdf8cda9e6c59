"""What a run will cost, before it runs: sizes of a model, its floating-point work, the memory of a
rank and the dry run that prints them.
"""
