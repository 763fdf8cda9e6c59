"""The files of a run directory: whose it is (lock), its configuration and what of it may change on
a resume, its attempts, the code it ran.
"""
