"""Ranks, what they tell each other apart from gradients, and what makes them compute the same:
threads, determinism, random numbers.
"""
