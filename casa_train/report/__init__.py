"""Pages and tables from what runs wrote: one run, or the jobs of a sweep side by side. Each part of
a page is one file beside its template.
"""
