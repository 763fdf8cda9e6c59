"""The model and its processor: everything that training and an export share; `modeling_casa.py`
puts the parts together. The folder is flat, imports nothing of the project and needs torch,
transformers, einops, pillow and numpy only: it is copied whole into every export, so training and
inference run the same code.
"""
