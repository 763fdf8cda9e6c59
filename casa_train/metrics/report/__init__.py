"""The page of a run. Each part of it is a file of its own: what it shows, beside its template.

To add a section, give `RunData` an optional field, prepare its content in a file here, pass that in
`page.write_report` and include a template of its own in `templates/page.html.j2`.
"""

import logging

# Where the home directory takes no files it says so twice, and works without.
logging.getLogger("matplotlib").setLevel(logging.ERROR)

from casa_train.metrics.report.page import write_report  # noqa: E402
from casa_train.metrics.report.run_data import RunData  # noqa: E402
from casa_train.metrics.report.samples import choose_answers  # noqa: E402

__all__ = ["RunData", "choose_answers", "write_report"]
