"""The benchmarks of the paper: read as they are published, asked and scored by the authors'
protocol or by lmms-eval's, beside the published rows.
"""
