"""Configuration -> a model with first values, pretrained or random, and with parameter groups for
its optimiser.
"""
