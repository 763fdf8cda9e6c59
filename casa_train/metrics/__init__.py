"""What a run reports: sinks take one record a step; `report.py` draws the HTML page."""
