"""`python -m casa_train.evaluate EXPORT --benchmarks ...` from top to bottom."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

import casa_train
from casa_train.distributed.ranks import Ranks
from casa_train.errors import UserError
from casa_train.evaluate.benchmarks.answering import Asker, batches_of
from casa_train.evaluate.benchmarks.kept import KeptAnswers, check_folder, weights_digests
from casa_train.evaluate.benchmarks.page import write_page
from casa_train.evaluate.benchmarks.picture_source import PictureSource
from casa_train.evaluate.benchmarks.protocols import PROTOCOLS, Task
from casa_train.evaluate.benchmarks.reading import Benchmark, read_benchmark, remarks
from casa_train.evaluate.benchmarks.request import Request
from casa_train.evaluate.benchmarks.results import (
    OF_ONE_MODEL,
    PAGE,
    RESULTS,
    alone,
    join,
    lines_file,
    read_lines,
    read_results,
    write_lines,
    write_results,
)
from casa_train.export.loading import load_model, load_processor, side_of_tokens
from casa_train.export.writer import exported_step
from casa_train.io.log import warn
from casa_train.io.precision import DTYPES


def run_benchmarks(request: Request, ranks: Ranks) -> dict[str, Any]:
    """Asks, scores and writes; collective.

    :return: on the first rank the content of `benchmarks.json`, with what earlier commands found
        for the same export under the same protocol; on others nothing.
    :raises UserError: a benchmark or an export that cannot be used, or a disk that takes no more.
    """
    ranks.agree(lambda: check_folder(request.out))
    asking = BenchmarkRun(request, ranks)
    ranks.log(*asking.dropped())
    benchmarks = [asking.read(name) for name in request.names]  # all are there, or none is asked
    result: dict[str, Any] = {}
    for benchmark in benchmarks:
        result = asking.run(benchmark) or result
    ranks.first_does(lambda: _write_page(request, benchmarks, result))
    return result


def _write_page(
    request: Request, benchmarks: Sequence[Benchmark], result: Mapping[str, Any]
) -> None:
    answers = {name: read_lines(request.out, name) for name in result["benchmarks"]}
    source = PictureSource({b.name: b for b in benchmarks}, request.source)
    write_page(request.out / PAGE, result, answers, source.picture)


class BenchmarkRun:
    """An export under a protocol; every method is collective.

    The model is loaded when there is something to ask.
    """

    def __init__(self, request: Request, ranks: Ranks) -> None:
        self.request, self.ranks = request, ranks
        self.protocol = PROTOCOLS[request.protocol]
        # Before anything is loaded, see `_check_same`.
        digests = ranks.broadcast(ranks.first_does(lambda: weights_digests(request.export)))
        self.digests: Mapping[str, str] = digests or {}
        # The first rank's transformers copies the export's code to where every rank runs it.
        first = ranks.first_does(self._load_processor)
        self.processor = ranks.agree(lambda: first or self._load_processor())
        self.head = {
            "export": str(request.export),
            "step": exported_step(request.export),
            "backbone": _backbone(request.export),
            "protocol": self.protocol.name,
            "max_pixels": self.processor.max_pixels,
            "token_side": side_of_tokens(self.processor),
            "dtype": request.dtype or "auto",
            "weights_sha256": {n: d for n, d in self.digests.items() if n.endswith(".safetensors")},
        }
        self._asker: Asker | None = None

    def dropped(self) -> list[str]:
        """What to say of earlier results in the same folder that are of something else."""
        before = read_results(self.request.out)
        other = [key for key in OF_ONE_MODEL if before and before.get(key) != self.head[key]]
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
        first = self.ranks.first_does(read)
        whole = self.ranks.agree(lambda: first or read())
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
            model = ranks.agree(self._load_model)
            ranks.first_does(self._check_same)
            self._asker = Asker(model, self.processor)
        asker, own = self._asker, missing[ranks.rank :: ranks.world]
        with tqdm(
            total=sum(map(len, own)),
            desc=benchmark.name,
            unit=" questions",
            disable=None if ranks.first else True,  # None: where there is no terminal
        ) as bar:
            ranks.agree(lambda: self._answer(asker, benchmark, task, own, kept, bar.update))

    def _answer(self, asker: Asker, *asked: Any) -> None:
        """A rank that fails says so at once: `agree` waits until the others have done their share,
        which stays kept.
        """
        try:
            asker.answer(*asked)
        except UserError as error:
            if self.ranks.world > 1:
                warn(f"rank {self.ranks.rank}: {error} The others finish their share first.")
            raise

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
        with alone(self.request.out):
            write_lines(self.request.out, benchmark.name, records)
            result = write_results(self.request.out, self.head, benchmark.name, entry)
        said = f"{benchmark.name}: {entry['score']:.1f} over {len(records)} questions"
        if entry["unreadable"]:
            said += f", {entry['unreadable']} of which have no picture that can be read"
        self.ranks.log(f"{said}; {self.request.out / lines_file(benchmark.name)}")
        return result

    def _check_same(self) -> None:
        """What was loaded must be what answers are kept under: a run in training writes its export
        anew, maybe while the benchmarks were read.

        :raises UserError: it is another.
        """
        now = weights_digests(self.request.export)
        if changed := sorted(n for n in {*now, *self.digests} if now.get(n) != self.digests.get(n)):
            raise UserError(
                f"{self.request.export}: {', '.join(changed)} changed while it was loaded; nothing "
                "was asked. Expected an export that stays as it is: run the command again, or name "
                "one that nothing writes anew, such as a copy."
            )

    def _load_processor(self) -> Any:
        side = self.request.image_size or self.protocol.image_size
        options = {} if side is None else {"image_size": side}
        with _loading(self.request.export):
            return load_processor(self.request.export, **options)

    def _load_model(self) -> Any:
        with _loading(self.request.export):
            dtype = self.request.dtype
            model = load_model(self.request.export, DTYPES[dtype] if dtype else "auto")
            return model.to(self.ranks.device).eval()


def _backbone(export: Path) -> str:
    """The type of its text model."""
    with _loading(export):
        config = json.loads((export / "config.json").read_text(encoding="utf-8"))
        return str(config["text_config"]["model_type"])


def _missing(
    benchmark: Benchmark, batches: Sequence[Sequence[int]], kept: KeptAnswers
) -> list[Sequence[int]]:
    """The batches of which an answer is not kept."""
    there = kept.read()
    return [batch for batch in batches if any(benchmark.rows[i] not in there for i in batch)]


@contextlib.contextmanager
def _loading(export: Path) -> Iterator[None]:
    """:raises UserError: whatever transformers or the export's own code cannot read, or memory does
    not hold.
    """
    try:
        yield
    except UserError:
        raise
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{export} does not fit in memory: {str(error).splitlines()[0]} Expected room for the "
            "whole model on every rank's device: free it, start fewer ranks on a device, or name "
            "--dtype bf16 where its files are fp32."
        ) from error
    except (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"{export} cannot be loaded with transformers {transformers.__version__}: {lines[0]} "
            "Expected an export that is whole, as 'python -m casa_train.export' writes it; write "
            "it again from its run."
        ) from error
