"""casa_train: training cross-attention vision-language models (CASA, arXiv 2512.19535)."""

__version__ = "0.1.0"
