"""Streams of published datasets: one order on any ranks and workers, exact resume, bad data."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem

from casa_train.config.checks import check
from casa_train.config.data_schema import StreamConfig, StreamDatasetConfig
from casa_train.config.schema import Config
from casa_train.data.build import list_streams, open_data
from casa_train.data.lengths import measure
from casa_train.data.schemas.rows import finevision
from casa_train.data.stream.lanes import block_packs
from casa_train.data.stream.row_groups import Retries, list_files, read_row_group
from casa_train.data.stream.stream_source import StreamSource
from casa_train.data.stream.subsets import open_subset
from casa_train.errors import UserError
from casa_train.metrics.sinks.jsonl import read_metrics
from tests.helpers.commands import ROOT, TINY, environment, run, train_command
from tests.helpers.fake_hub import serving
from tests.helpers.stream_data import (
    SETTINGS,
    changed,
    loaders,
    open_all,
    png,
    processor,
    read_step,
    row,
    saved,
    write_card,
    write_finevision,
    write_subset,
)

STEPS = 8
# Every pack holds one sample of `row`, in the order in which a lane draws them.
ALONE = changed(SETTINGS, text_tokens=32, open_packs=1, balance_block=1)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_finevision(tmp_path_factory.mktemp("hub") / "FineVision")


@pytest.fixture(scope="module")
def sources(published: Path) -> dict[str, StreamSource]:
    return open_all(published, {"small": 6})


@pytest.fixture(scope="module")
def undisturbed(sources: dict[str, StreamSource]) -> list[list[list[str]]]:
    """Ids of every pack of eight steps, one rank, no workers."""
    ranks = loaders(sources)
    return [read_step(ranks) for _ in range(STEPS)]


def single(root: Path, rows: list[dict[str, Any]], group: int) -> dict[str, StreamSource]:
    """A dataset of one subset and one file."""
    write_subset(root, "only", [rows], group)
    return open_all(root)


def by_lane(sources: dict[str, StreamSource], samples: int, **changes: Any) -> list[list[str]]:
    """The first ids that every lane draws."""
    settings = changed(ALONE, **changes)
    ranks = loaders(sources, settings=settings, packs_per_step=settings.stream.lanes)
    steps = [read_step(ranks) for _ in range(samples)]
    assert all(len(pack) == 1 for step in steps for pack in step)
    return [[step[lane][0] for step in steps] for lane in range(settings.stream.lanes)]


# --------------------------------------------------------------------------------------- order


@pytest.mark.slow
@pytest.mark.parametrize(("world", "workers"), [(2, 1), (3, 0), (4, 2)])
def test_the_order_depends_on_neither_ranks_nor_workers(
    sources: dict[str, StreamSource],
    undisturbed: list[list[list[str]]],
    world: int,
    workers: int,
) -> None:
    ranks = loaders(sources, world, workers)
    assert [read_step(ranks) for _ in range(3)] == undisturbed[:3]


@pytest.mark.slow
@pytest.mark.parametrize(("packs_per_step", "lanes"), [(6, 4), (4, 6), (2, 8), (10, 4)])
def test_steps_and_lanes_need_not_divide_each_other(
    sources: dict[str, StreamSource], packs_per_step: int, lanes: int
) -> None:
    """Two ranks divide both; the order is that of the lanes, pack i from lane i mod L."""
    settings = changed(SETTINGS, lanes=lanes, packs_per_step=packs_per_step)
    one = loaders(sources, 1, 0, settings, packs_per_step)
    packs = [pack for _ in range(5) for pack in read_step(one)]
    two = loaders(sources, 2, 0, settings, packs_per_step)
    found = [pack for _ in range(3) for pack in read_step(two)]
    state = saved(two[0])
    two = loaders(sources, 2, 0, settings, packs_per_step)
    for loader in two:
        loader.load_state_dict(state)
    assert [*found, *(pack for _ in range(2) for pack in read_step(two))] == packs
    same_blocks = changed(settings, balance_block=block_packs(settings))
    by_rows = loaders(sources, 1, 0, same_blocks, lanes)
    rounds = [pack for _ in range(-(-len(packs) // lanes)) for pack in read_step(by_rows)]
    assert rounds[: len(packs)] == packs


def test_ranks_that_do_not_divide_the_lanes_are_refused(sources: dict[str, StreamSource]) -> None:
    config = Config(data=changed(SETTINGS, packs_per_step=10))
    with pytest.raises(UserError, match=r"data.stream.lanes is 12, which 5 ranks do not divide"):
        open_data(config, processor(), sources, 5, lambda value: [value])


def test_an_epoch_shows_every_row_once_and_the_next_in_another_order(tmp_path: Path) -> None:
    """24 row groups of 3 rows over 12 lanes: two groups a lane are an epoch."""
    only = single(tmp_path / "hub", [row("only", i) for i in range(72)], group=3)
    lanes = by_lane(only, 12, open_units=1)
    every = sorted(f"only/train-00000-of-00001_{i}" for i in range(72))
    first, second = ([s for lane in lanes for s in lane[i : i + 6]] for i in (0, 6))
    assert sorted(first) == sorted(second) == every
    assert first != second
    groups = [int(lane[0].rpartition("_")[2]) // 3 for lane in lanes]
    assert groups != sorted(groups)  # row groups are shuffled, and so are their rows
    assert any(lane[:3] != sorted(lane[:3]) for lane in lanes)


@pytest.mark.slow
def test_sources_keep_their_rates_and_no_lane_is_without_one(
    sources: dict[str, StreamSource],
) -> None:
    """20 rows six times over against 90 rows; over all lanes, off by what they have open."""
    ranks = loaders(sources, settings=changed(SETTINGS, lanes=2), packs_per_step=2)
    lanes: list[Counter[str]] = [Counter(), Counter()]
    for _ in range(100):
        for lane, pack in enumerate(read_step(ranks)):
            lanes[lane].update(sample.partition("/")[0] for sample in pack)
    both = lanes[0] + lanes[1]
    assert both["small"] / both["big"] == pytest.approx(120 / 90, rel=0.1)
    assert all(0.5 < counts["small"] / counts["big"] < 3 for counts in lanes)


@pytest.mark.slow
def test_neighbouring_lanes_give_packs_of_like_size(tmp_path: Path) -> None:
    rows = [row("only", i, images=i % 9) for i in range(120)]
    only = single(tmp_path / "hub", rows, group=10)

    def slowest(block: int) -> float:
        settings = changed(SETTINGS, balance_block=block, open_packs=1)
        (loader,) = loaders(only, settings=settings)
        loads = [[b.image_tokens for b in loader.next_step()] for _ in range(16)]
        return sum(map(max, loads)) * 12 / sum(map(sum, loads))

    assert slowest(8) < 1 + 0.6 * (slowest(1) - 1)


# -------------------------------------------------------------------------------------- resume


@pytest.mark.slow
def test_resume_at_any_step_goes_on_as_if_nothing_had_happened(
    sources: dict[str, StreamSource], undisturbed: list[list[list[str]]]
) -> None:
    """Saved again right after the restore, and read by 1, 2, 3 and 4 ranks in turn."""
    running = loaders(sources)
    states = [saved(running[0])]
    for _ in range(STEPS - 1):
        read_step(running)
        states.append(saved(running[0]))
    for step, state in enumerate(states):
        world = 1 + step % 4
        ranks = loaders(sources, world)
        for loader in ranks:
            loader.load_state_dict(state)
        again = saved(ranks[-1])
        assert again == state
        ranks = loaders(sources, world)
        for loader in ranks:
            loader.load_state_dict(again)
        assert read_step(ranks) == undisturbed[step]
    sizes = [len(json.dumps(state)) / SETTINGS.stream.lanes for state in states[1:]]
    assert max(sizes) < 2000  # bytes a lane: rows are named, not stored


@pytest.mark.slow
def test_ranks_and_workers_change_on_the_way(
    sources: dict[str, StreamSource], undisturbed: list[list[list[str]]]
) -> None:
    found: list[list[list[str]]] = []
    state = None
    for world, workers, steps in ((2, 2, 3), (4, 1, 2), (1, 3, 2), (3, 0, 1)):
        ranks = loaders(sources, world, workers)
        for loader in ranks if state is not None else ():
            loader.load_state_dict(state)  # type: ignore[arg-type]
        found += [read_step(ranks) for _ in range(steps)]
        states = [saved(loader) for loader in ranks]
        assert all(s == states[0] for s in states)  # every rank would save the same
        state = states[0]
    assert found == undisturbed


def test_another_number_of_lanes_is_refused(sources: dict[str, StreamSource]) -> None:
    state = saved(loaders(sources)[0])
    other = loaders(sources, settings=changed(SETTINGS, lanes=6))[0]
    with pytest.raises(UserError, match=r"holds 12 lanes, data.stream.lanes is 6"):
        other.load_state_dict(state)


# -------------------------------------------------------------------------------------- memory


def test_memory_decides_only_how_often_row_groups_are_read(
    sources: dict[str, StreamSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: Counter[tuple[str, int]] = Counter()

    def counting(file: Any, group: int, retries: Retries) -> Any:
        reads[file.url, group] += 1
        return read_row_group(file, group, retries)

    monkeypatch.setattr("casa_train.data.stream.row_reader.read_row_group", counting)
    settings = changed(SETTINGS, lanes=2)
    enough = read_step(loaders(sources, 1, 0, settings, 8))
    once = reads.total()
    reads.clear()
    assert read_step(loaders(sources, 1, 0, settings, 8, memory_mib=0)) == enough
    assert reads.total() > 3 * once


# ------------------------------------------------------------------------------------ bad data


@pytest.mark.slow
def test_a_damaged_row_group_costs_its_own_rows_and_moves_no_other(tmp_path: Path) -> None:
    root = tmp_path / "hub"
    whole = by_lane(single(root, [row("only", i) for i in range(72)], group=3), 6)
    path = root / "only" / "train-00000-of-00001.parquet"
    group = pq.read_metadata(path).row_group(7)
    with path.open("r+b") as file:
        file.seek(group.column(0).data_page_offset)
        file.write(b"\xff" * 64)
    ranks = loaders(open_all(root), settings=ALONE)
    failures, found = [], [[] for _ in range(12)]  # type: ignore[var-annotated]
    for _ in range(5):
        for lane, batch in enumerate(ranks[0].next_step()):
            failures += batch.failures
            found[lane] += batch.sample_ids
    lost = {f"only/train-00000-of-00001_{i}" for i in (21, 22, 23)}
    for before, after in zip(whole, found, strict=True):
        kept = [sample for sample in before if sample not in lost]
        assert after[: len(kept)] == kept[: len(after)] and len(after) == 5
    assert {f.reason for f in failures} == {"damaged_row_group"}
    assert {f"{f.source}/{f.key}" for f in failures} == lost
    assert "row group 7 of" in failures[0].detail and len(failures) == 3


def broken_rows() -> dict[str, dict[str, Any]]:
    """A row of every kind of damage, by the reason that is counted."""
    good = row("only", 5)
    return {
        "missing_image": {**good, "images": [{"bytes": None, "path": "../../etc/passwd"}]},
        "unreadable_image": {**good, "images": [{"bytes": b"\x89PNG cut", "path": None}]},
        "extreme_aspect": {**good, "images": [{"bytes": png(1, 400), "path": None}]},
        "no_texts": {**good, "texts": None},
        "no_turns": {**good, "texts": [{"user": None, "assistant": None}]},
        "no_source": {**good, "source": None},
    }


def test_bad_rows_are_counted_by_reason_and_nothing_stops(tmp_path: Path) -> None:
    bad = broken_rows()
    rows = [row("only", i) for i in range(18)] + [r for r in bad.values()]
    only = single(tmp_path / "hub", rows, group=2)
    (loader,) = loaders(only, settings=changed(ALONE, lanes=1, open_units=1), packs_per_step=1)
    batches = [loader.next_step()[0] for _ in range(18)]
    reasons = Counter(f.reason for b in batches for f in b.failures)
    good = {sample for b in batches for sample in b.sample_ids}
    assert good == {f"only/train-00000-of-00001_{i}" for i in range(18)}
    assert set(reasons) <= set(bad) and sum(reasons.values()) >= 5
    assert all(count == 1 for count in reasons.values())


def test_a_subset_of_bad_rows_alone_reaches_the_trainer_as_failures(tmp_path: Path) -> None:
    only = single(tmp_path / "hub", [broken_rows()["no_texts"]] * 8, group=4)
    (loader,) = loaders(only, settings=changed(ALONE, lanes=1), packs_per_step=1)
    (batch,) = loader.next_step()
    assert batch.sample_ids == [] and len(batch.failures) >= 500
    assert batch.inputs.chunks  # the dummy sample


def test_a_long_conversation_drops_trailing_turns_and_a_long_turn_is_counted(
    tmp_path: Path,
) -> None:
    long = row("only", 7, turns=9, images=1)
    endless = row("only", 8)
    endless["texts"][0]["assistant"] = "word " * 400
    rows = [long, endless, *(row("only", i) for i in range(4))]
    only = single(tmp_path / "hub", rows, group=6)
    settings = changed(ALONE, lanes=1, text_tokens=100)
    (loader,) = loaders(only, settings=settings, packs_per_step=1)
    batches = [loader.next_step()[0] for _ in range(6)]
    assert sum(b.left_out for b in batches) >= 1 and not any(b.failures for b in batches)
    samples = {sample for b in batches for sample in b.sample_ids}
    assert samples >= {f"only/train-00000-of-00001_{i}" for i in (0, 2, 3, 4, 5)}
    assert all(b.text_tokens <= 100 for b in batches)
    first = finevision("k", long, [i["bytes"] for i in long["images"]])
    assert measure(first, processor())[0] > 100


def test_budgets_that_nothing_fits_are_named(tmp_path: Path) -> None:
    only = single(tmp_path / "hub", [row("only", i) for i in range(6)], group=3)
    (loader,) = loaders(only, settings=changed(ALONE, text_tokens=9))
    with pytest.raises(UserError, match=r"data.text_tokens is 9.*Raise the budgets"):
        loader.next_step()


@pytest.mark.slow
def test_llava_onevision_streams_beside_it(tmp_path: Path) -> None:
    turn = pa.struct([("role", pa.string()), ("content", pa.string())])
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema(
        [
            ("id", pa.string()),
            ("image", image),
            ("conversations", pa.list_(turn)),
            ("data_source", pa.string()),
        ]
    )
    talk = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "this"}]
    rows = [
        {
            "id": str(i),
            "image": None if i % 2 else {"bytes": png(28, 28), "path": "x.png"},
            "conversations": talk,
            "data_source": "wit",
        }
        for i in range(6)
    ]
    root = write_finevision(tmp_path / "hub")
    (root / "wit").mkdir()
    pq.write_table(pa.Table.from_pylist(rows, schema), root / "wit" / "train-0.parquet")
    write_card(root)
    dataset = StreamDatasetConfig(source=str(root), schema="llava_onevision")
    (loader,) = loaders({"wit": open_subset(dataset, "wit")})
    batches = [batch for _ in range(2) for batch in loader.next_step()]
    assert {s for b in batches for s in b.sources} == {"wit"}
    assert not any(b.failures for b in batches)


# ------------------------------------------------------------------------------------- network


class FlakyFiles(LocalFileSystem):
    """A disk that refuses the first reads of a process."""

    protocol = "flaky"
    refuse = 0

    def open(self, path: str, *arguments: Any, **options: Any) -> Any:
        if FlakyFiles.refuse > 0:
            FlakyFiles.refuse -= 1
            raise ConnectionResetError("the other side hung up")
        return super().open(path, *arguments, **options)

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(path).removeprefix("flaky://")


@pytest.fixture
def flaky(published: Path) -> Callable[[int], str]:
    """A file on a disk that refuses so many reads."""
    fsspec.register_implementation("flaky", FlakyFiles, clobber=True)

    def refuse(times: int) -> str:
        FlakyFiles.refuse = times
        return f"flaky://{published}/small/train-00000-of-00001.parquet"

    return refuse


def test_a_failed_read_is_tried_again(
    flaky: Callable[[int], str], capfd: pytest.CaptureFixture[str]
) -> None:
    retries = Retries(attempts=3, retry_seconds=0.01)
    (file,) = list_files([flaky(2)], retries)
    assert file.rows == (4, 4, 4, 4, 4)
    flaky(2)
    assert read_row_group(file, 1, retries).num_rows == 4
    warnings = capfd.readouterr().err.splitlines()
    assert len(warnings) == 4 and "attempt 3 of 3" in warnings[-1] and "hung up" in warnings[-1]


def test_a_read_that_keeps_failing_is_named(flaky: Callable[[int], str]) -> None:
    retries = Retries(attempts=3, retry_seconds=0.01)
    (file,) = list_files([flaky(0)], retries)
    flaky(3)
    with pytest.raises(UserError, match=r"flaky://.*could not be read in 3 attempts.*hung up"):
        read_row_group(file, 0, retries)


def test_an_outage_in_a_worker_reaches_the_trainer_as_one_message(
    published: Path, flaky: Callable[[int], str]
) -> None:
    source = open_all(published)["small"]
    flaky_files = tuple(list_files([flaky(0)], Retries(1, 0)))
    broken = {"small": replace(source, files=flaky_files)}
    (loader,) = loaders(broken, workers=1, attempts=2, retry_seconds=0.01)
    flaky(10_000)
    with pytest.raises(UserError, match=r"could not be read in 2 attempts") as error:
        loader.next_step()
    assert "Traceback" not in str(error.value)


def test_a_missing_file_and_a_cut_file_are_named_at_once(tmp_path: Path, published: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere.parquet cannot be read: FileNotFoundError"):
        list_files([str(tmp_path / "nowhere.parquet")], Retries(5, 60))
    path = tmp_path / "cut.parquet"
    path.write_bytes((published / "small/train-00000-of-00001.parquet").read_bytes()[:-100])
    with pytest.raises(UserError, match=r"cut.parquet is no whole parquet file"):
        list_files([str(path)], Retries(5, 60))


@pytest.mark.slow
def test_a_file_that_changed_under_way_is_named(tmp_path: Path) -> None:
    only = single(tmp_path / "hub", [row("only", i) for i in range(6)], group=3)
    shutil.rmtree(tmp_path / "hub")
    other = single(tmp_path / "hub", [row("only", i + 3) for i in range(6)], group=3)
    assert only["only"].fingerprint != other["only"].fingerprint
    with pytest.raises(UserError, match=r"has changed since this run listed it"):
        read_row_group(only["only"].files[0], 0, Retries(1, 0))


HUB_PROGRAM = """
import json
from casa_train.config.data_schema import StreamDatasetConfig
from casa_train.data.stream.row_groups import Retries
from casa_train.data.stream.subsets import open_subset, subset_names
from tests.helpers.stream_data import loaders, read_step
retries, name = Retries(4, 0.01), "HuggingFaceM4/FineVision"
names = subset_names(name, None, retries)
dataset = StreamDatasetConfig(source=name, repeats={"small": 6})
sources = {s: open_subset(dataset, s, retries) for s in names}
ranks = loaders(sources, world=2, workers=1, attempts=4, retry_seconds=0.01)
print(json.dumps([[s.fingerprint for s in sources.values()], read_step(ranks)]))
"""


@pytest.mark.slow
def test_a_hub_with_cut_answers_gives_what_a_local_copy_gives(
    tmp_path: Path,
    published: Path,
    sources: dict[str, StreamSource],
    undisturbed: list[list[list[str]]],
) -> None:
    """Through the same requests as the real hub; the first read of a file ends in the middle."""
    with serving(published, "HuggingFaceM4/FineVision") as hub:
        hub.broken = 1
        hub_environment = {
            **environment(),
            "HF_ENDPOINT": hub.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path),
        }
        done = subprocess.run(
            [sys.executable, "-c", HUB_PROGRAM],
            cwd=ROOT,
            env=hub_environment,
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert hub.broken == 0 and hub.reads > 20
    fingerprints, step = json.loads(done.stdout.splitlines()[-1])
    assert "without sending complete message body" in done.stderr
    assert fingerprints == [s.fingerprint for s in sources.values()]
    assert step == undisturbed[0]


# ------------------------------------------------------------------------------- configuration


def configured(**fields: Any) -> Config:
    config = Config()
    config.data.stream = StreamConfig(datasets={"fv": StreamDatasetConfig(**fields)}, attempts=1)
    return config


def test_subsets_and_repeats_follow_the_configuration(published: Path) -> None:
    lines: list[str] = []
    config = configured(source=str(published), repeats={"small": 6})
    streams = list_streams(config, lines.append)
    assert {name: s.repeats for name, s in streams.items()} == {"fv/big": 1, "fv/small": 6}
    assert lines == ["listing the files of 2 subsets of fv"]
    config = configured(source=str(published), exclude=["big"])
    assert list(list_streams(config, lines.append)) == ["fv/small"]
    config = configured(source=str(published), subsets=["big"])
    data = open_data(
        config, processor(), list_streams(config, lines.append), 1, lambda value: [value]
    )
    assert list(data.fingerprints) == ["fv/big"]
    assert "90 rows in 19 row groups of 2 files" in data.notes[0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"subsets": ["bigg"]}, r"datasets.fv.subsets names \['bigg'\].*\['big', 'small'\]"),
        ({"exclude": ["big", "small"]}, r"leaves every subset of .* out"),
        ({"schema": "fine"}, r"datasets.fv.schema is 'fine'; expected one of \['finevision'"),
        ({"split": "test"}, r"has the splits \['train'\]; expected 'test'"),
        ({"source": "/nowhere/at/all"}, r"source '/nowhere/at/all', which is no directory"),
        ({"source": "./nowhere"}, r"source './nowhere', which is no directory"),
        ({"source": "a/copy/of/it"}, r"source 'a/copy/of/it', which is no directory"),
    ],
)
def test_mistakes_are_named(published: Path, fields: dict[str, Any], message: str) -> None:
    config = configured(**{"source": str(published), **fields})
    with pytest.raises(UserError, match=message):
        list_streams(config, lambda line: None)


@pytest.fixture
def partial(published: Path, tmp_path: Path) -> Path:
    """A copy with the whole card, without the files of the first subset that it names."""
    shutil.copytree(published, tmp_path / "partial")
    shutil.rmtree(tmp_path / "partial" / "big")
    return tmp_path / "partial"


def test_a_partial_copy_gives_what_it_holds(partial: Path) -> None:
    lines: list[str] = []
    absent = ["DoclingMatix", "big"]
    config = configured(source=str(partial), exclude=absent, repeats={"big": 6, "small": 3})
    streams = list_streams(config, lines.append)
    assert {name: (s.repeats, s.rows) for name, s in streams.items()} == {"fv/small": (3, 20)}
    assert lines == [
        f"data.stream.datasets.fv.exclude names {absent}, which {partial} does not hold: ignored",
        f"data.stream.datasets.fv.repeats names ['big'], which {partial} does not hold: ignored",
        "listing the files of 1 subsets of fv",
    ]
    lines.clear()
    assert list(list_streams(configured(source=str(partial)), lines.append)) == ["fv/small"]
    assert "holds no files of 1 of its 2 subsets, which are left out: big" in lines[0]
    lines.clear()
    assert list(list_streams(configured(source=str(partial), subsets=["small"]), lines.append))
    assert len(lines) == 1  # what is not asked for is no news


def test_what_a_partial_copy_lacks_is_named(partial: Path) -> None:
    with pytest.raises(UserError, match=r"names \['big'\], .*subsets are \['small'\].*README"):
        list_streams(configured(source=str(partial), subsets=["big"]), lambda line: None)
    shutil.rmtree(partial / "small")
    with pytest.raises(UserError, match="holds no file of any subset"):
        list_streams(configured(source=str(partial)), lambda line: None)


def test_what_is_here_is_checked_before_the_hub_is_asked(
    published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datasets import config as library

    config = configured(source=str(published), subsets=["bigg"])
    here = config.data.stream.datasets.pop("fv")
    there = StreamDatasetConfig("no-such/dataset")
    config.data.stream.datasets = {"hub": there, "fv": here}
    lines: list[str] = []
    with pytest.raises(UserError, match=r"datasets.fv.subsets names \['bigg'\]"):
        list_streams(config, lines.append)
    assert lines == []
    # Where the hub may not be asked, waiting for it is of no use.
    monkeypatch.setattr(library, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config.data.stream.datasets = {"hub": there}
    config.data.stream.attempts, config.data.stream.retry_seconds = 8, 60.0
    with pytest.raises(UserError, match=r"of the hub \(there is no directory of that name\)"):
        list_streams(config, lines.append)
    assert len(lines) == 1 and "data.stream.datasets.hub=null leaves it out" in lines[0]


def test_datasets_stay_in_the_order_of_the_configuration(published: Path, partial: Path) -> None:
    config = configured(source=str(published), subsets=["big"])
    config.data.stream.datasets["a"] = StreamDatasetConfig(str(partial))
    assert list(list_streams(config, lambda line: None)) == ["fv/big", "a/small"]


def test_the_same_samples_twice_are_refused(published: Path) -> None:
    config = configured(source=str(published))
    config.data.stream.datasets["copy"] = config.data.stream.datasets["fv"]
    with pytest.raises(UserError, match=r"count twice: .*fv.subsets, big.*copy.subsets, big"):
        list_streams(config, lambda line: None)


def test_filtering_by_ratings_is_refused(published: Path) -> None:
    config = configured(source=str(published))
    config.data.ratings = {"relevance": 3}
    with pytest.raises(UserError, match=r"data.ratings is .*streams do not filter by"):
        list_streams(config, lambda line: None)


def test_a_run_has_prepared_sources_or_streams(published: Path) -> None:
    config = configured(source=str(published))
    config.optim.groups = {"all": None}  # type: ignore[dict-item]
    config.data.sources = {"a": None}  # type: ignore[dict-item]
    with pytest.raises(UserError, match=r"data.stream.datasets is \['fv'\]; expected none beside"):
        check(config)


# ---------------------------------------------------------------------------------- whole runs


@pytest.mark.slow
def test_two_ranks_train_on_a_stream_and_resume(published: Path, tmp_path: Path) -> None:
    processor().tokenizer.save_pretrained(tmp_path / "tokenizer")
    command = train_command(
        [
            "+experiment=demo",
            "data=finevision_stream",
            *TINY,
            "~data.stream.datasets.llava_onevision",
            f"data.stream.datasets.finevision.source={published}",
            "data.stream.datasets.finevision.exclude=[]",
            "data.stream.lanes=4",
            f"model.tokenizer={tmp_path}/tokenizer",
            f"run_dir={tmp_path}/run",
            "trainer.steps=5",
            "checkpoint.every=2",
        ],
        processes=2,
    )
    done = run(command)
    assert "streaming 2 subsets: 110 rows" in done.stdout
    first = list(read_metrics(tmp_path / "run" / "metrics.jsonl"))
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_5")
    done = run(command)
    assert "at step 4" in done.stdout
    again = list(read_metrics(tmp_path / "run" / "metrics.jsonl"))
    same = ("step", "loss", "samples_digest", "samples", "left_out")
    assert len(again) == 5
    assert [[r[k] for k in same] for r in again] == [[r[k] for k in same] for r in first]
