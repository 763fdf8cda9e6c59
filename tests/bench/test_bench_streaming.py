"""Streams of frames: what is counted, how many are held, and what stands beside it.

Nothing here asserts a time.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from casa_train import modeling
from casa_train.bench import _held_streams as held
from casa_train.bench import streaming
from casa_train.bench.__main__ import main
from casa_train.bench._published_streams import PUBLISHED, session
from casa_train.bench._streams import Script, Stream, Turn
from casa_train.export.writer import write_export
from casa_train.modeling.processing_casa import CasaProcessor
from data_recipes.synthetic import build_tokenizer
from tests.helpers.bench_numbers import bench
from tests.helpers.tiny import tiny_model, tiny_siglip_config

TURNS, TEXT, NEW, PROMPT = 5, 2, 3, 4
STREAM = ["--turns", str(TURNS), "--text-tokens", str(TEXT), "--new-tokens", str(NEW)]
STREAM += ["--prompt-tokens", str(PROMPT), "--image-size", "56", "--device", "cpu"]


def save_export(directory: Path, mechanism: str, **options: Any) -> Path:
    """An export of a tiny model, with a template that has nothing around turns and images."""
    model = tiny_model(mechanism, **options)
    processor = CasaProcessor(build_tokenizer(), token_side=model.visual.token_side)
    write_export(
        directory,
        save_model=lambda path: model.save_pretrained(path),
        save_processor=lambda path: processor.save_pretrained(path),
        source=Path(str(modeling.__file__)).parent,
        card="",
        provenance={},
        gate=lambda path: "",
    )
    return directory


def check_stream(turns: list[dict[str, Any]], image_tokens: int, token_bytes: int) -> None:
    """The cache holds the text, and images only where the mechanism inserts them."""
    for index, turn in enumerate(turns, start=1):
        # The last new token of a turn enters with the next one.
        expected = PROMPT + index * (TEXT + NEW + image_tokens) - 1
        assert turn["cache_tokens"] == expected
        assert turn["cache_bytes"] >= expected * token_bytes
        assert turn["first_token"] > 0 and turn["tokens_per_second"] > 0


def check_state(casa: list[dict[str, Any]], insertion: list[dict[str, Any]]) -> None:
    """Beside the cache only the ids of the stream may grow from turn to turn."""
    for turns in (casa, insertion):
        growth = turns[-1]["state_bytes"] - turns[1]["state_bytes"]
        new_ids = (TURNS - 2) * (TEXT + NEW)
        assert 0 <= growth <= new_ids * 8
    assert casa[1]["state_bytes"] > insertion[1]["state_bytes"]  # the open window


def test_streaming_compares_random_models(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = bench(tmp_path, "streaming", "--size", "tiny", *STREAM)
    casa, insertion = (found["streams"][name] for name in ("casa", "insertion"))
    token_bytes = 2 * 2 * 2 * 16 * 4  # layers, keys and values, heads, width, fp32
    check_stream(casa["turns"], image_tokens=0, token_bytes=token_bytes)
    check_stream(insertion["turns"], image_tokens=4, token_bytes=token_bytes)
    check_state(casa["turns"], insertion["turns"])
    # The first turns that are timed are those of a stream of their own.
    assert [turn["cache_tokens"] for turn in casa["first_turns"]] == [PROMPT + TEXT + NEW - 1]
    assert casa["cache_tokens"]["last"] == casa["turns"][-1]["cache_tokens"]
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if line.startswith("KV cache, tokens")]
    assert rows[0].split()[3:] == ["8", "28", "3.50", "12", "48", "4.00"]


def test_streaming_compares_ways_to_decode(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = bench(tmp_path, "streaming", "--size", "tiny", "--compare-paths", *STREAM)
    speeds = found["paths"]
    assert list(speeds) == ["casa", "insertion"]
    steps, passes, backbone = (
        speeds["casa"][way] for way in ("decode steps", "whole passes", "backbone alone")
    )
    assert len({steps, passes, backbone}) == 3  # each was measured
    row = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("casa  "))
    shown = [f"{x:.1f}" for x in (steps, passes, backbone)]
    ratios = [f"{steps / x:.2f}" for x in (passes, backbone)]
    assert row.split() == ["casa", shown[0], shown[1], ratios[0], shown[2], ratios[1]]


def test_streaming_of_exports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exports = [save_export(tmp_path / name, name) for name in ("casa", "insertion")]
    found = bench(tmp_path, "streaming", *STREAM, "--export", *map(str, [*exports, exports[0]]))
    assert list(found["streams"]) == ["casa", "insertion", "casa 3"]
    for name, image_tokens in (("casa", 0), ("insertion", 4), ("casa 3", 0)):
        check_stream(found["streams"][name]["turns"], image_tokens, token_bytes=2 * 2 * 2 * 16 * 4)
    assert f"insertion: {exports[1]}" in capsys.readouterr().out


def test_frames_are_whole_tokens_of_an_export_s_own_tower(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of 32 pixels, of which 64 are no multiple of 28."""
    path = save_export(tmp_path / "own", "insertion", vision_config=tiny_siglip_config())
    stream = ["streaming", *STREAM, "--export", str(path)]
    found = bench(tmp_path, *stream, "--image-size", "64")
    check_stream(found["streams"]["insertion"]["turns"], 4, token_bytes=2 * 2 * 2 * 16 * 4)
    assert main(stream) == 2
    wanted = "--image-size is 56; it must be a positive multiple of 32, the side of an image token"
    assert f"{wanted} of insertion" in capsys.readouterr().err


@pytest.mark.parametrize("most", [1, 7, 16])
def test_the_most_that_hold_are_found(most: int) -> None:
    for limit in range(20):
        asked: list[int] = []

        def holds(number: int, asked: list[int] = asked, limit: int = limit) -> bool:
            asked.append(number)
            return number <= limit

        assert held.most_held(holds, most) == min(limit, most)
        assert len(set(asked)) == len(asked) <= 9
        assert max(asked) <= most
        # What is reported about the answer and one stream more was measured.
        assert {min(limit, most), min(limit + 1, most)} - {0} <= set(asked)


def test_rounds_are_read_by_median_and_nearest_rank() -> None:
    seconds = (*[0.2] * 18, 0.7, 0.9)
    rounds = held.Rounds(3, seconds, stream_bytes=5, memory_bytes=None)
    assert (rounds.median, rounds.slow) == (0.2, 0.7)  # of 20 one may be later
    assert held.Rounds(3, (0.2, 0.4, 0.9), 5, None).slow == 0.9
    none = held.Rounds(3, (), 0, None).record()  # out of memory
    assert none["median"] is none["percentile_95"] is None
    assert json.loads(json.dumps(none, allow_nan=False))["streams"] == 3


def small_script() -> Script:
    return Script(
        seed=3, image_size=56, vocabulary=90, prompt_tokens=PROMPT, text_tokens=TEXT, new_tokens=NEW
    )


def past_of(model: Any, turns: int) -> Stream:
    model.generation_config.eos_token_id = None
    past = Stream(model)
    for index in range(turns):
        past.generate(*small_script().given(past, index))
    return past


@pytest.mark.parametrize("mechanism", ["casa", "insertion"])
def test_copies_of_a_stream_go_on_like_it(mechanism: str) -> None:
    past = past_of(tiny_model(mechanism), 3)
    copies = Stream(past.model, held._copies(past, 4))
    single = Stream(past.model, held._copies(past, 1))
    assert (copies.batch, single.batch) == (4, 1)
    for index in (3, 4):
        given = small_script().given(past, index)
        ids, point, frames, new = given
        batched = copies.generate(ids.expand(4, -1), point, frames * 4, new)
        assert torch.equal(single.generate(*given), past.generate(*given))
        alone = past.model.streaming_cache.casa.history
        assert torch.equal(copies.cache.casa.history, alone.expand(4, -1))
        assert torch.equal(batched, batched[:1].expand(4, -1))


def test_rows_of_a_batch_see_frames_and_text_of_their_own() -> None:
    past = past_of(tiny_model("casa"), 1)
    ids, point, frames, _ = small_script().given(Stream(past.model, held._copies(past, 3)), 1)
    assert ids.shape == (3, TEXT) and point == 0
    assert len({frame.sum().item() for frame in frames}) == len({*map(tuple, ids.tolist())}) == 3


@pytest.mark.parametrize(("budget", "rounds"), [(1e-9, 4), (1e9, 7)])
def test_rounds_end_where_more_than_half_are_late(budget: float, rounds: int) -> None:
    past = past_of(tiny_model("casa"), 2)
    before = past.cache_bytes()
    for way, live in ((held.BATCHED, 3), (held.SINGLY, 2)):
        found = held.play_rounds(past, small_script(), 2, live, way, rounds=7, budget=budget)
        assert len(found.seconds) == rounds and found.streams == live
        assert found.stream_bytes > live * before
    assert past.cache_bytes() == before  # the rounds played on copies


def test_streams_that_memory_does_not_hold_end_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    past = past_of(tiny_model("casa"), 2)
    whole = past.model.generate_from_image

    def generate(ids: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        if len(ids) > 5:
            raise torch.OutOfMemoryError("of a test")
        return whole(ids, *arguments, **options)

    monkeypatch.setattr(past.model, "generate_from_image", generate)
    arguments = argparse.Namespace(fps=1e-3, rounds=1, most=40, turns=2)
    found = held._search(past, small_script(), 2, held.BATCHED, arguments)
    assert found["streams"] == found["by_median"] == 5
    assert list(found["tries"]) == ["1", "2", "4", "5", "6", "8"]
    shown = held.table({"casa": {held.BATCHED: {"last": found}}}, arguments)
    lines = [line.split() for line in shown.splitlines()]
    assert lines[3] == ["streams", "of", "0.001", "frames/s", "5"]
    assert lines[7][-1] == lines[8][-1] == "–"  # one stream more has no time


def test_streams_held_at_a_rate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rate = ["--fps", "0.001", "--rounds", "1", "--most", "3"]
    found = bench(tmp_path, "streaming", "--size", "tiny", *STREAM, *rate)["held"]
    assert list(found) == ["casa", "insertion"]
    for ways in found.values():
        assert list(ways) == ["batched", "one by one"]
        for ages in ways.values():
            assert [ages[age]["behind"] for age in ("first", "last")] == [1, TURNS]
            for search in ages.values():
                assert search["streams"] == search["by_median"] == 3
                one, three = (search["tries"][n]["stream_bytes"] for n in ("1", "3"))
                assert 2.9 * one < three < 3.9 * one  # a batch has more room to grow
        grown = [ways["one by one"][age]["tries"]["1"] for age in ("first", "last")]
        assert grown[0]["stream_bytes"] < grown[1]["stream_bytes"]
    printed = capsys.readouterr().out.splitlines()
    row = next(line for line in printed if line.startswith("streams of 0.001 frames/s"))
    assert row.split()[4:] == ["3+"] * 8


def test_no_stream_is_held_at_a_rate_that_none_keeps(tmp_path: Path) -> None:
    rate = ["--fps", "1e6", "--rounds", "1", "--most", "3"]
    found = bench(tmp_path, "streaming", "--size", "tiny", *STREAM, *rate)["held"]
    searches = [search for ways in found.values() for x in ways.values() for search in x.values()]
    assert len(searches) == 8
    for search in searches:
        assert search["streams"] == 0 and list(search["tries"]) == ["1"]


def test_published_sessions_are_of_the_default_turns() -> None:
    """What their KV caches hold follows from the tokens of a turn, as it does in ours."""
    parser = argparse.ArgumentParser()
    streaming.add_arguments(parser)
    ours = parser.parse_args([])
    for row in PUBLISHED:
        image = (row.image_size // 28) ** 2 if "insertion" in row.model else 0
        turn = ours.text_tokens + ours.new_tokens + image
        # Qwen's template has 24 tokens more before the first frame.
        prompt = ours.prompt_tokens + (24 if "Qwen" in row.model else 0)
        assert row.cache_tokens == prompt + row.turns * turn - 1
        assert row.new_tokens == ours.new_tokens
    assert PUBLISHED[0].first_token == (0.080, 0.459)
    assert PUBLISHED[-1].memory_bytes == 6.8 * 2**30
    assert all("H100" in row.machine for row in PUBLISHED)


def test_a_session_goes_from_the_first_to_the_last_tenth() -> None:
    turns = [
        Turn(0.1 * i, 100.0 - i, cache_tokens=7 * i, cache_bytes=1, state_bytes=1, memory_bytes=i)
        for i in range(21)
    ]
    facts = {"device": "a slate", "dtype": "float32"}
    found = session("casa", facts, turns, image_size=56, new_tokens=3)
    assert found.first_token == pytest.approx((0.1, 1.9))  # medians of three
    assert found.tokens_per_second == pytest.approx((99, 81))
    assert (found.turns, found.cache_tokens, found.memory_bytes) == (21, 140, 20)
    assert found.machine == "here, a slate, float32"


def test_published_sessions_stand_below_ours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = bench(tmp_path, "streaming", "--size", "tiny", "--published", *STREAM)
    ours, theirs = found["sessions"][:2], found["sessions"][2:]
    assert [row["model"] for row in ours] == ["casa", "insertion"]
    assert [row["cache_tokens"] for row in ours] == [28, 48]
    for row in ours:
        turns = found["streams"][row["model"]]["turns"]
        assert row["first_token"] == [turns[0]["first_token"], turns[-1]["first_token"]]
        assert (row["turns"], row["image_size"], row["new_tokens"]) == (TURNS, 56, NEW)
        assert row["memory_bytes"] is None
    assert len(theirs) == len(PUBLISHED)
    lines = capsys.readouterr().out.splitlines()
    below = lines[next(i for i, line in enumerate(lines) if line.startswith("model  ")) + 1 :]
    assert all("here, " in line and "float32" in line for line in below[:2])
    assert below[0].split()[-2:] == ["28", "–"]
    assert all("published, one H100" in line for line in below[2:8])
    assert below[2].split()[-5:] == ["89.5", "->", "20.1", "266,773", "34.2"]
