"""What a step reports: its counts, the fields of its record, and the sinks that take records."""
