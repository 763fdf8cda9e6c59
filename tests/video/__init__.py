"""Tests of casa_train/video."""
