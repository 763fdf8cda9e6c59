"""What the record of a step says: its fields, work, ranks and memory; the log of starts."""

from __future__ import annotations

import io
import json
import os
import pickle
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from casa_train.config.schema import Config
from casa_train.cost.peak import peak_tflops
from casa_train.cost.sizes import work_counter
from casa_train.cost.work import count_operations
from casa_train.data.budget import Budget
from casa_train.data.materialize import Entry, build_batch, encode_sample
from casa_train.data.sample import ImageSlot, Sample, Turn
from casa_train.data.tokens import load_tokenizer
from casa_train.distributed.ranks import Ranks
from casa_train.metrics.counts import count_step
from casa_train.metrics.fields import FIELDS, SOMETIMES
from casa_train.metrics.meter import Meter, memory_bytes
from casa_train.modeling.configuration_casa import CasaConfig
from casa_train.modeling.modeling_casa import CasaForConditionalGeneration
from casa_train.modeling.processing_casa import CasaProcessor
from casa_train.modeling.windows import Chunk
from casa_train.run.starts import StartLog, read_starts
from casa_train.training.hooks import described
from casa_train.training.state import Progress
from tests.helpers.commands import TEMPLATE, run
from tests.helpers.counted_models import dense_pairs
from tests.helpers.tiny import tiny_text_config, tiny_vision_config


@pytest.fixture(scope="module")
def processor(data_dir: Path) -> CasaProcessor:
    return CasaProcessor(load_tokenizer(str(data_dir / "tokenizer")), 300 * 300, TEMPLATE)


@cache
def picture() -> bytes:
    """8 by 8 image tokens: whole windows of the tower, so that its attention has no padding."""
    buffer = io.BytesIO()
    Image.new("RGB", (224, 224), "teal").save(buffer, "PNG")
    return buffer.getvalue()


STILLS = Sample(
    "stills",
    "s",
    (Turn((ImageSlot(0), "what is it?"), "red"), Turn((ImageSlot(1), "and this?"), "a square")),
    (picture(),) * 2,
)
FRAMES = (ImageSlot(0), "it", ImageSlot(1), ImageSlot(2), " moves")
LIVE = Sample(
    "live",
    "s",
    (Turn(("tell.",), "it moves", live=FRAMES),),
    (picture(),) * 3,
    video=True,
)
WORDS = Sample("words", "s", (Turn(("one and one?",), "two"),), ())


def entry(sample: Sample, processor: CasaProcessor) -> Entry:
    encoded = encode_sample(sample, processor)
    lengths = len(encoded.ids), encoded.chunk().image_tokens
    return Entry("mixture", sample.source, sample.key, *lengths, lambda: sample)


FUSIONS: list[dict[str, Any]] = [
    {"mechanism": "casa", "window_scope": "all_frames"},
    {"mechanism": "cross_attention"},
    {"mechanism": "insertion"},
]


@pytest.mark.parametrize("samples", [(STILLS, LIVE), (WORDS,)], ids=["images", "dummy"])
@pytest.mark.parametrize("fusion", FUSIONS, ids=lambda fusion: str(fusion["mechanism"]))
def test_the_work_of_a_real_batch_is_counted_where_it_is_loaded(
    fusion: dict[str, Any], samples: tuple[Sample, ...], processor: CasaProcessor
) -> None:
    model = CasaForConditionalGeneration(
        CasaConfig(tiny_text_config(layers=3, vocab_size=600), tiny_vision_config(), fusion=fusion)
    )
    config = Config(fusion=fusion)
    config.model.vision.train_last_blocks = -1
    counter = pickle.loads(pickle.dumps(work_counter(config, model)))  # as workers get it
    entries = [entry(sample, processor) for sample in samples]
    batch = build_batch(0, entries, processor, Budget(400, 400), counter)

    shapes = [
        Chunk.of_grids(c.text, c.points, ((8, 8),) * len(c.images), c.follows)
        for c in batch.inputs.chunks
    ]
    if samples == (WORDS,):
        shapes[-1] = Chunk.of_grids(1, (0,), ((1, 1),))
        assert len(shapes) == 2 and batch.operations > 0
    else:
        assert shapes[1].follows == (False, True, True)
    answers = len(batch.targets)
    sizes = counter.text, counter.vision, counter.mechanism, shapes, answers
    expected = sum(part.total for part in count_operations(*sizes).values())
    assert batch.operations == expected

    # The same sizes with the pairs that torch's dense attention works through: torch agrees.
    if samples != (WORDS,):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
            model(packed=batch.inputs).logits.sum().backward()
        pairs = dense_pairs(model, batch.inputs.chunks)
        dense = count_operations(*sizes, pairs=pairs)
        total = sum(part.total for part in dense.values())
        assert total == pytest.approx(counted.get_total_flops(), rel=0.02)


@pytest.mark.slow
def test_every_field_is_documented_and_every_documented_field_is_written(tmp_path: Path) -> None:
    """Two real ranks; the values that can be checked from outside are right."""
    out = tmp_path / "lines"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    run([*torchrun, "--nproc_per_node=2", "-m", "tests.helpers.nan_steps", str(out), "3"])
    lines = [json.loads(line) for line in out.read_text().splitlines() if line[0] == "{"]
    records = [line for line in lines if "step" in line and "loss" in line]
    assert [record["step"] for record in records] == list(range(1, 13))
    for record in records:
        assert record.keys() | SOMETIMES == FIELDS.keys()
    assert any(record.keys() >= SOMETIMES for record in records)
    record = records[-1]
    assert record["samples"] == 2 and record["operations"] == 3  # rank 0 has 1, rank 1 has 2
    assert record["balance"] == pytest.approx(1.5 / 2)
    assert record["tflops"] == pytest.approx(1.5 / record["seconds"] / 1e12)
    assert record["mfu"] is None  # nobody knows what a CPU could do
    assert 0 < record["rank_seconds_min"] <= record["rank_seconds_max"] < record["seconds"]
    # Rank 1's loader sleeps for 2 s in step 5: its wait is the step's, and it is the slowest.
    assert records[4]["slowest_rank"] == 1
    assert records[4]["data_seconds"] >= 2
    assert records[4]["rank_seconds_max"] - records[4]["rank_seconds_min"] > 1
    assert 1 << 20 < record["memory_bytes"] <= record["memory_peak_bytes"]
    assert len({record["samples_digest"] for record in records}) == 1  # the same names each step
    assert records[0]["start"] == 1 and records[0]["time"] <= records[1]["time"]


def test_the_digest_names_samples_and_their_order() -> None:
    class Named:
        """A batch without content."""

        inputs, targets, answer_sources = None, torch.zeros(0), []
        text_tokens = image_tokens = pairs = left_out = operations = 0
        fills, failures = (0.5, 0.25), []

        def __init__(self, *ids: str) -> None:
            self.sample_ids = list(ids)

    def digest(*batches: Named) -> str:
        return count_step(batches, Ranks()).digest

    assert digest(Named("a", "b"), Named("c")) == digest(Named("a", "b"), Named("c"))
    different = [
        digest(Named("a", "b"), Named("c")),
        digest(Named("a"), Named("b", "c")),
        digest(Named("b", "a"), Named("c")),
        digest(Named("c"), Named("a", "b")),
        digest(Named("a,b"), Named("c")),
    ]
    assert len(set(different)) == len(different)
    assert count_step([Named("a")], Ranks()).record()["pack_efficiency"] == 0.5


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA A10G", 70.0),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),  # a seventh of a GPU
        ("Tesla V100-SXM2-16GB", None),  # has no bf16
        ("NVIDIA GeForce GTX 1080", None),
        (None, None),
    ],
)
def test_known_devices_have_a_peak(name: str | None, peak: float | None) -> None:
    assert peak_tflops(name, "bf16", None) == peak
    assert peak_tflops(name, "fp32", None) is None
    assert peak_tflops(name, "fp32", 12.5) == 12.5


def test_utilisation_is_the_share_of_the_peak() -> None:
    meter = Meter(peak_tflops=2.0, start=3)
    meter.begin()
    meter.data_arrived()
    with meter.forward():
        torch.ones(100, 100) @ torch.ones(100, 100)
    counts = {"text_tokens": 10.0, "image_tokens": 20.0}
    record = meter.record([meter.measured()] * 2, [3e9, 1e9], counts)
    assert record["mfu"] == record["tflops"] / 2.0
    assert record["tflops"] == pytest.approx(2e9 / record["seconds"] / 1e12)
    assert record["balance"] == pytest.approx(2 / 3) and record["start"] == 3
    assert record["image_tokens_per_second"] == 2 * record["text_tokens_per_second"]


def test_memory_of_a_process_grows_with_it() -> None:
    before, _ = memory_bytes(torch.device("cpu"))
    held = torch.ones(64 << 20, dtype=torch.uint8)
    now, peak = memory_bytes(torch.device("cpu"))
    assert now - before > 0.9 * held.nbytes and peak >= now


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_the_peak_of_a_step_forgets_what_was_before() -> None:
    """A sweep runs its jobs in one process."""
    held = torch.ones(256 << 20, dtype=torch.uint8)
    del held
    before, past = memory_bytes(torch.device("cpu"))
    Meter().begin()
    _, peak = memory_bytes(torch.device("cpu"))
    assert past - before > 200 << 20 and peak - before < 50 << 20


def test_a_start_says_where_it_came_from_and_why_it_left(tmp_path: Path) -> None:
    path, progress = tmp_path / "starts.jsonl", Progress()
    assert read_starts(path) == []
    start = StartLog(path, {"ranks": 2, "device": "CPU"})
    start.begin(progress)
    progress.step = 5
    start.close("max_hours")
    # Killed: no word of leaving, its last line cut.
    StartLog(path, {}, found_step=8).begin(progress)
    with path.open("a") as file:
        file.write('{"start": 2, "le')
    start = StartLog(path, {})
    start.begin(progress)
    progress.step = 7
    start.close(described(ValueError("no more\ndata")))
    start = StartLog(path, {})
    start.begin(progress)
    start.leave("watchdog")
    start.close(None)  # it has said why already
    assert start.number == 4

    starts = read_starts(path)
    assert [s["start"] for s in starts] == [1, 2, 3, 4]
    assert starts[0]["after_step"] == 0 and starts[0]["ranks"] == 2 and starts[0]["step"] == 5
    assert starts[0]["pid"] == os.getpid() and starts[0]["left_time"] >= starts[0]["time"]
    assert "left" not in starts[1] and starts[1]["after_step"] == 5
    assert [s["found_step"] for s in starts[:2]] == [None, 8]
    left = [s.get("left") for s in starts]
    assert left == ["max_hours", None, "ValueError: no more", "watchdog"]
    assert StartLog(None, {}).number == 1  # another rank
    lost = StartLog(tmp_path / "gone" / "starts.jsonl", {})
    lost.begin(progress)  # a log that cannot be written stops nobody
    lost.close(None)
