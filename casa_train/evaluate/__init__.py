"""Answers and scores: exact match with the images, blind and by guessing; held-out loss while a run
trains; how much answers attend to images.
"""
