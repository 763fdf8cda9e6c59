"""Checkpoints that others published -> exports of this project, by a file of rules that accounts
for every tensor and every setting, and the proof by the original's own code.
"""
