"""One optimiser step, the loop around it, and what watches the loop: audit, memory probe, signals,
watchdog.
"""
