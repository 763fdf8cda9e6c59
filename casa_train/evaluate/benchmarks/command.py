"""`python -m casa_train.evaluate EXPORT --benchmarks ...` from top to bottom."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

import casa_train
from casa_train.distributed.ranks import Ranks
from casa_train.errors import UserError
from casa_train.evaluate.benchmarks.answering import Asker, batches_of
from casa_train.evaluate.benchmarks.kept import KeptAnswers, weights_digests
from casa_train.evaluate.benchmarks.protocols import PROTOCOLS, Task
from casa_train.evaluate.benchmarks.question import BENCHMARKS
from casa_train.evaluate.benchmarks.reading import Benchmark, read_benchmark, remarks
from casa_train.evaluate.benchmarks.results import (
    RESULTS,
    join,
    lines_file,
    read_results,
    write_lines,
    write_results,
)
from casa_train.export.loading import load_model, load_processor
from casa_train.export.writer import exported_step
from casa_train.io.files import EXPORT_MARKER
from casa_train.io.precision import DTYPES
from casa_train.run.layout import EXPORT


@dataclass(frozen=True)
class Request:
    """What the command is asked for.

    :param export: an export; :param names: of benchmarks, in the order of `BENCHMARKS`.
    :param source: a folder of local copies; None: the hub.
    :param out: gets the answers and the results.
    :param samples: questions of each benchmark; None: all.
    :param image_size: of the processor; None: the protocol's, or else the export's own limit.
    :param dtype: of the parameters; None: that of the files.
    """

    export: Path
    names: Sequence[str]
    protocol: str
    source: Path | None
    out: Path
    samples: int | None
    batch_size: int
    image_size: int | None = None
    dtype: str | None = None


def names_of(text: str) -> list[str]:
    """`chartqa,docvqa` or `all` -> names, in the order of the tables.

    :raises UserError: an unknown one, or none.
    """
    asked = [name.strip().lower() for name in text.split(",") if name.strip()]
    unknown = [name for name in asked if name not in (*BENCHMARKS, "all")]
    if unknown or not asked:
        raise UserError(
            f"--benchmarks {text}: {', '.join(unknown) or 'nothing'} is no benchmark; expected "
            f"some of {','.join(BENCHMARKS)}, or all."
        )
    return [name for name in BENCHMARKS if name in asked or "all" in asked]


def export_of(place: Path) -> Path:
    """An export, or that of a run.

    :raises UserError: neither.
    """
    for path in (place, place / EXPORT):
        if (path / EXPORT_MARKER).is_file():
            return path
    raise UserError(
        f"{place} is no export and holds none; expected a directory with {EXPORT_MARKER}. Write "
        f"one with 'python -m casa_train.export {place} --out {place / EXPORT}'."
    )


def default_out(export: Path, protocol: str) -> Path:
    """Beside the export, a folder for each protocol: figures of two do not compare."""
    ending = "" if protocol == "casa" else f"_{protocol}"
    return export.with_name(f"{export.resolve().name}_benchmarks{ending}")


def run_benchmarks(request: Request, ranks: Ranks) -> dict[str, Any]:
    """Asks, scores and writes; collective.

    :return: on the first rank the content of `benchmarks.json`, with what earlier commands found
        for the same export under the same protocol; on others nothing.
    :raises UserError: a benchmark or an export that cannot be used, or a disk that takes no more.
    """
    session = Session(request, ranks)
    ranks.log(*session.dropped())
    benchmarks = [session.read(name) for name in request.names]  # all are there, or none is asked
    result: dict[str, Any] = {}
    for benchmark in benchmarks:
        result = session.run(benchmark) or result
    return result


class Session:
    """An export under a protocol; every method is collective.

    The model is loaded when there is something to ask.
    """

    def __init__(self, request: Request, ranks: Ranks) -> None:
        self.request, self.ranks = request, ranks
        self.protocol = PROTOCOLS[request.protocol]
        # The first rank's transformers copies the export's code to where every rank runs it.
        processor = ranks.first_does(self._load_processor)
        self.processor = processor or ranks.agree(self._load_processor)
        digests = ranks.broadcast(ranks.first_does(lambda: weights_digests(request.export)))
        self.digests: Mapping[str, str] = digests or {}
        self.head = {
            "export": str(request.export),
            "step": exported_step(request.export),
            "protocol": self.protocol.name,
            "max_pixels": self.processor.max_pixels,
            "dtype": request.dtype or "auto",
            "weights_sha256": {n: d for n, d in self.digests.items() if n.endswith(".safetensors")},
        }
        self._asker: Asker | None = None

    def dropped(self) -> list[str]:
        """What to say of earlier results in the same folder that are of something else."""
        before = read_results(self.request.out)
        other = [key for key, value in self.head.items() if before and before.get(key) != value]
        if not other or not before.get("benchmarks"):
            return []
        return [
            f"{self.request.out / RESULTS}: {', '.join(before['benchmarks'])} were of another "
            f"{' and '.join(other)} and are replaced"
        ]

    def read(self, name: str) -> Benchmark:
        """A benchmark, of which what is not as published is said."""

        def read() -> Benchmark:
            return read_benchmark(name, self.request.source)

        # `datasets` fills its cache once, for all ranks of a machine.
        whole = self.ranks.first_does(read) or self.ranks.agree(read)
        self.ranks.log(*remarks(whole))
        return whole.subset(self.request.samples)

    def run(self, benchmark: Benchmark) -> dict[str, Any] | None:
        """Asks what was not answered before; the first rank writes and returns the results."""
        task = self.protocol.tasks[benchmark.name]
        kept = KeptAnswers(
            self.request.out, benchmark.name, self._key(benchmark, task), self.ranks.rank
        )
        batches = batches_of(benchmark, self.processor, self.request.batch_size)
        began = time.perf_counter()
        missing = self.ranks.broadcast(
            self.ranks.first_does(lambda: _missing(benchmark, batches, kept))
        )
        if missing:
            self._ask(benchmark, task, missing, kept)
        seconds = time.perf_counter() - began
        return self.ranks.first_does(lambda: self._finish(benchmark, task, kept, seconds))

    def _key(self, benchmark: Benchmark, task: Task) -> dict[str, Any]:
        """Whatever an answer depends on, but for the machine."""
        return {
            "files": dict(self.digests),
            "max_pixels": self.head["max_pixels"],
            "dtype": self.head["dtype"],
            "questions": benchmark.revision,
            "prompts": [task.prompt(question) for question in benchmark.questions],
            "max_new_tokens": task.max_new_tokens,
            "batch_size": self.request.batch_size,
        }

    def _ask(
        self,
        benchmark: Benchmark,
        task: Task,
        missing: Sequence[Sequence[int]],
        kept: KeptAnswers,
    ) -> None:
        ranks = self.ranks
        if self._asker is None:
            self._asker = Asker(ranks.agree(self._load_model), self.processor)
        asker, own = self._asker, missing[ranks.rank :: ranks.world]
        with tqdm(
            total=sum(map(len, own)),
            desc=benchmark.name,
            unit=" questions",
            disable=None if ranks.first else True,  # None: where there is no terminal
        ) as bar:
            ranks.agree(lambda: asker.answer(benchmark, task, own, kept, bar.update))

    def _finish(
        self, benchmark: Benchmark, task: Task, kept: KeptAnswers, seconds: float
    ) -> dict[str, Any]:
        records, entry = join(benchmark, task, kept.read())
        entry |= {
            "seconds": seconds,
            "batch_size": self.request.batch_size,
            "versions": {
                "casa_train": casa_train.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }
        write_lines(self.request.out, benchmark.name, records)
        result = write_results(self.request.out, self.head, benchmark.name, entry)
        said = f"{benchmark.name}: {entry['score']:.1f} over {len(records)} questions"
        if entry["unreadable"]:
            said += f", {entry['unreadable']} of which have no picture that can be read"
        self.ranks.log(f"{said}; {self.request.out / lines_file(benchmark.name)}")
        return result

    def _load_processor(self) -> Any:
        with _loading(self.request.export):
            processor = load_processor(self.request.export)
        side = self.request.image_size or self.protocol.image_size
        if side is not None:
            processor.max_pixels = side * side
        return processor

    def _load_model(self) -> Any:
        with _loading(self.request.export):
            dtype = self.request.dtype
            model = load_model(self.request.export, DTYPES[dtype] if dtype else "auto")
            return model.to(self.ranks.device).eval()


def _missing(
    benchmark: Benchmark, batches: Sequence[Sequence[int]], kept: KeptAnswers
) -> list[Sequence[int]]:
    """The batches of which an answer is not kept."""
    there = kept.read()
    return [batch for batch in batches if any(benchmark.rows[i] not in there for i in batch)]


@contextlib.contextmanager
def _loading(export: Path) -> Iterator[None]:
    """:raises UserError: whatever transformers or the export's own code cannot read."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"{export} cannot be loaded with transformers {transformers.__version__}: {lines[0]} "
            "Expected an export that is whole, as 'python -m casa_train.export' writes it; write "
            "it again from its run."
        ) from error
