"""What every page stands on, whichever command writes it: one HTML file that loads nothing, its
colours and the parts it is built of, and small pictures.
"""
