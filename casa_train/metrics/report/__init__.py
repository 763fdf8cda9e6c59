"""The page of a run. Each part of it is a file of its own: what it shows, beside its template.

To add a section, give `RunData` an optional field, prepare its content in a file here, pass that in
`page.write_report` and include a template of its own in `templates/page.html.j2`.
"""

from casa_train.metrics.report.page import write_report
from casa_train.metrics.report.run_data import RunData
from casa_train.metrics.report.samples import choose_answers

__all__ = ["RunData", "choose_answers", "write_report"]
