"""What a step reports: its counts, its times, the fields of its record, and the sinks that take
records.
"""
