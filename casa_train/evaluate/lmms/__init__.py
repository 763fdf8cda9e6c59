"""Exports as models of lmms-eval: `python -m lmms_eval --model casa`. lmms-eval finds the manifest
by its entry point, and with it the adapter; requests become conversations, keywords options.
"""
