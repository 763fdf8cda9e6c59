"""Training from published datasets without preparing them: row groups dealt to lanes, read over the
network, packed as they come.
"""
