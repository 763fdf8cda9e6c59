"""What the validations of a run measure: held-out samples, benchmarks, or both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from casa_train.config.schema import Config
from casa_train.distributed.ranks import Ranks
from casa_train.evaluate.benchmarks.while_training import AskedBenchmark, open_benchmarks
from casa_train.evaluate.held_out import HeldOut, open_held_out
from casa_train.metrics.sinks.base import Record
from casa_train.modeling.processing_casa import CasaProcessor


@dataclass(frozen=True)
class Measured:
    """At least one of the two.

    :param held_out: samples with their loss, exact match and fixed questions.
    :param benchmarks: in the order of the tables.
    """

    held_out: HeldOut | None = None
    benchmarks: Sequence[AskedBenchmark] = ()

    def loss_compares(self, record: Record) -> bool:
        """Whether the loss of an earlier record is of the same samples."""
        digest = None if self.held_out is None else self.held_out.digest
        return bool(record.get("samples_digest") == digest)

    def others(self, record: Record) -> list[str]:
        """Names of the benchmarks whose scores in an earlier record do not compare."""
        then = record.get("benchmarks") or {}
        return [b.name for b in self.benchmarks if b.name in then and not _same(b, then)]

    def whole(self, record: Record) -> bool:
        """Whether an earlier record measured all that is measured now."""
        then = record.get("benchmarks") or {}
        return self.loss_compares(record) and all(_same(b, then) for b in self.benchmarks)


def _same(benchmark: AskedBenchmark, records: Mapping[str, Record]) -> bool:
    return bool((records.get(benchmark.name) or {}).get("digest") == benchmark.digest)


def open_measured(
    config: Config,
    processor: CasaProcessor,
    ranks: Ranks,
    trained: Mapping[str, str] | None = None,
) -> Measured | None:
    """What validations measure, None where there are none to be; collective.

    :param trained: by name, fingerprints of what is trained.
    :raises UserError: on every rank alike: splits or benchmarks that cannot be used.
    """
    held_out = ranks.agree(lambda: open_held_out(config, processor, ranks.world, trained))
    benchmarks = open_benchmarks(config, processor, ranks)
    return Measured(held_out, benchmarks) if held_out or benchmarks else None
