"""What published models score on the benchmarks, to stand beside.

The figures are those of CASA's authors: of the models' cards (first release, December 2025) and of
the models that they released again with the second version of arXiv 2512.19535 (2026), evaluated by
their own script at image size 896, which the protocol `casa` follows. Those of mPLUG-Owl3 and
Qwen2.5-VL stand in the same tables. They are compared with figures by another protocol at one's own
risk: prompts and token limits alone move some of them by points.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from casa_train.evaluate.benchmarks.question import BENCHMARKS


@dataclass(frozen=True)
class PublishedRow:
    """A model's figures.

    :param family: of its backbone, helium or qwen; empty for mPLUG-Owl3, which is neither.
    :param release: card or 2026; empty for models of others.
    :param figures: by benchmark, in the unit of `Task.total`'s `score`.
    """

    family: str
    model: str
    release: str
    figures: Mapping[str, float]

    @property
    def name(self) -> str:
        """Model and release."""
        return f"{self.model}, {self.release}" if self.release else self.model


# family | model | release | Chart Doc Info OCRB Text RealW AI2D GQA MME
TABLE = """
helium | Helium1-VL-2B (insertion) | card | 81.6 89.1 61.8 728 75.5 59.9 67.7 55.5 1732
helium | Helium1-VL-2B (insertion) | 2026 | 79.2 88.3 58.9 746 75.0 59.6 65.5 54.2 1665
helium | CASA-Helium1-VL-2B        | card | 73.4 83.7 48.6 723 71.0 58.3 63.3 54.6 1572
helium | CASA-Helium1-VL-2B        | 2026 | 77.6 86.3 55.1 740 75.5 58.2 66.0 55.6 1722
helium | CASA-Helium1-VL-2B-Shared | 2026 | 75.2 85.8 52.0 728 74.5 58.3 66.2 55.7 1637
       | mPLUG-Owl3 8B             |      | 59.2 55.9 36.8 527 69.0 63.9 73.4 65.0 1940
       | mPLUG-Owl3 2B             |      | 48.5 48.2 28.1 450 62.6 56.9 62.6 61.0 1551
qwen   | Qwen2.5-VL-3B             |      | 84.0 93.6 77.1 797 79.3 62.2 81.6 61.0 2249
qwen   | CASA-Qwen2_5-VL-3B        | card | 82.4 88.9 59.6 790 77.4 62.5 75.1 59.4 1918
qwen   | CASA-Qwen2_5-VL-3B        | 2026 | 81.8 87.9 58.2 796 76.5 62.1 76.1 59.4 1971
qwen   | CASA-Qwen2_5-VL-3B-Shared | 2026 | 81.4 87.8 59.1 797 76.6 63.0 74.3 59.2 2075
"""


def _row(line: str) -> PublishedRow:
    family, model, release, figures = (cell.strip() for cell in line.split("|"))
    numbers = map(float, figures.split())
    return PublishedRow(family, model, release, dict(zip(BENCHMARKS, numbers, strict=True)))


PUBLISHED = tuple(map(_row, TABLE.strip().splitlines()))

FAMILIES = {
    "helium": "helium",
    "llama": "helium",  # Helium1-2B's architecture
    "qwen2": "qwen",
    "qwen2_5_vl": "qwen",
    "qwen2_5_vl_text": "qwen",
}
"""The `model_type` of a text backbone -> the published rows that are of its kind."""


def rows_beside(backbone: str) -> tuple[PublishedRow, ...]:
    """The rows to stand beside a model: those of its backbone's family and of mPLUG-Owl3, with
    which the paper compares; all where no family has that backbone.

    :param backbone: the `model_type` of the text configuration.
    """
    family = FAMILIES.get(backbone)
    return tuple(row for row in PUBLISHED if family is None or row.family in (family, ""))
