"""Streams of exports and of whole sweeps: what enters, which jobs, what is told at which image."""

from __future__ import annotations

import json
import shutil
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from casa_train.bench.__main__ import main
from casa_train.bench._marks import HELD, PEAK, at_marks, marks_up_to, table
from casa_train.bench._streams import Turn
from casa_train.bench._sweep_exports import sweep_exports
from casa_train.bench._turn_forms import TurnForm, frame_side, ordinary_ids
from casa_train.config.compose import compose_config
from casa_train.errors import UserError
from casa_train.export.loading import load_model, load_processor
from casa_train.modeling.processing_casa import CasaProcessor
from data_recipes.synthetic import build_tokenizer
from tests.helpers.commands import TEMPLATE
from tests.helpers.tiny_export import FULL_TEMPLATE, MAX_PIXELS, MIN_PIXELS, write_tiny_export

QUESTION, ANSWER = "what colour is the circle", "red"
# Nothing special stands in these, so that a turn's end is plain text.
PLAIN = {
    "user_start": "what ",
    "assistant_start": " colour ",
    "assistant_end": " red red ",
    "bos": "",
}


@pytest.mark.parametrize("template", [TEMPLATE, FULL_TEMPLATE, PLAIN, {}], ids=str)
def test_turns_are_the_conversation_that_a_processor_would_encode(template: dict[str, str]) -> None:
    """Ids and columns of three turns in a row are those of the whole conversation at once."""
    processor = CasaProcessor(build_tokenizer(), template=template)
    form = TurnForm.of(processor)

    def ids_of(text: str) -> torch.Tensor:
        return torch.tensor([processor.tokenizer.encode(text, add_special_tokens=False)])

    entered, points = torch.empty((1, 0), dtype=torch.long), []
    messages: list[dict[str, Any]] = []
    for index in range(3):
        prompt = ids_of("look at" if index == 0 else "").long()
        ids, point = form.turn(index, prompt, ids_of(QUESTION))
        points.append(entered.shape[1] + point)
        entered = torch.cat([entered, ids], dim=1)
        begins = [{"type": "text", "text": "look at"}] if index == 0 else []
        content = [*begins, {"type": "image", "image": "x"}, {"type": "text", "text": QUESTION}]
        messages.append({"role": "user", "content": content})
        whole = processor.encode(messages, generation_prompt=True)
        assert entered[0].tolist() == list(whole.ids) and points == list(whole.points)
        entered = torch.cat([entered, ids_of(ANSWER)], dim=1)
        messages.append({"role": "assistant", "content": ANSWER})


def test_text_is_of_ordinary_tokens() -> None:
    tokenizer = build_tokenizer()
    processor = CasaProcessor(tokenizer, template=FULL_TEMPLATE)
    found = set(ordinary_ids(len(tokenizer), [processor]).tolist())
    assert found and not found & set(tokenizer.all_special_ids)
    assert found | set(tokenizer.added_tokens_decoder) >= set(range(len(tokenizer)))
    assert ordinary_ids(7, []).tolist() == list(range(7))


def test_frames_are_within_the_bounds_of_every_export() -> None:
    small, large = (
        CasaProcessor(build_tokenizer(), max_pixels=side**2, min_pixels=least**2)
        for side, least in ((100, 56), (952, 84))
    )
    assert frame_side(None, {}) == 224
    assert frame_side(None, {"large": large}) == 224
    assert frame_side(None, {"small": small, "large": large}) == 84
    assert frame_side(84, {"small": small, "large": large}) == 84
    with pytest.raises(UserError, match="is 224; .* 3,136 to 10,000 pixels.* of small"):
        frame_side(224, {"large": large, "small": small})
    other = CasaProcessor(build_tokenizer(), max_pixels=96**2, token_side=32)
    with pytest.raises(UserError, match="no frame of up to 224 x 224"):
        frame_side(None, {"small": small, "other": other})


def turn(number: int, memory: int | None = None) -> Turn:
    return Turn(number / 8, 100.0 - number, 10 * number, 1000 * number, 100 + number, memory)


def test_marks_are_medians_of_times_and_the_sizes_of_their_turn() -> None:
    turns = [turn(n) for n in range(1, 66)]
    first = [turn(n) for n in (3, 2)]  # of other streams, and of no other mark
    found = at_marks(turns, first, [1, 16, 64], weight_bytes=5_000_000)
    assert [(found[m]["first_token"], found[m]["median_of"]) for m in found] == [
        (2 / 8, 3),
        (statistics.median(range(13, 17)) / 8, 4),
        (statistics.median(range(57, 65)) / 8, 8),
    ]
    assert found["64"]["tokens_per_second"] == 100 - 60.5
    assert (found["16"]["cache_tokens"], found["16"]["state_bytes"]) == (160, 116)
    assert found["16"]["memory_bytes"] == 5_000_000 + 16_000 + 116
    assert found["16"]["memory"] == HELD and found["1"]["cache_tokens"] == 10
    on_gpu = at_marks([replace(t, memory_bytes=77) for t in turns], [], [16], 5_000_000)["16"]
    assert (on_gpu["memory_bytes"], on_gpu["memory"]) == (77, PEAK)
    shown = table({"one": {"marks": found}, "short": {"marks": {"1": found["1"]}}}, [1, 16])
    (row,) = (line.split() for line in shown.splitlines() if "tokens/s" in line)
    assert row == "decoding, tokens/s, after 1 image 16 images".split()
    assert shown.endswith("memory: weights, KV cache and streaming state")
    assert marks_up_to(20, None) == [1, 16] and marks_up_to(9, [9, 4, 30]) == [4, 9]
    for asked, message in (
        ([0, 4], "--marks holds 0"),
        ([50], "--marks begins at 50, but --turns"),
    ):
        with pytest.raises(UserError, match=message):
            marks_up_to(20, asked)


def test_marks_are_refused_before_anything_is_loaded(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*given: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("casa_train.bench.streaming.load_models", load)
    for options, message in (
        (["--marks", "0"], "--marks holds 0"),
        (["--marks", "0,4"], "--marks holds 0"),
        (["--marks", "50", "--turns", "20"], "--marks begins at 50, but --turns is 20"),
        (["--marks", "1,4", "--fps", "2"], "--marks beside --fps"),
        (["--marks", "1,4", "--compare-paths"], "--marks beside --compare-paths"),
    ):
        assert main(["streaming", "--device", "cpu", *options]) == 2
        assert message in capsys.readouterr().err


def write_job(sweep: Path, *overrides: str) -> Path:
    """A run's directory as a job of a sweep leaves it, without what it trained."""
    config = compose_config(["+experiment=demo", *overrides])
    run = sweep / ",".join(["t", *overrides])
    run.mkdir(parents=True)
    config.run_dir = str(run)
    (run / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    return run


def test_one_job_a_variant_is_played(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for mechanism in ("casa", "insertion"):
        for seed in (0, 1, 2):
            write_job(tmp_path, f"fusion={mechanism}", f"seed={seed}")
    with pytest.raises(UserError, match=r"no job of 't,\*' has an export of its own"):
        sweep_exports(tmp_path, "t,*")
    own = tmp_path / "t,fusion=casa,seed=1" / "export"
    write_tiny_export(own, "casa", {**FULL_TEMPLATE, "image_end": "<|eos|>"})
    shutil.copytree(own, tmp_path / "t,fusion=casa,seed=2" / "export")
    write_tiny_export(tmp_path / "t,fusion=insertion,seed=0" / "export", "insertion")
    (tmp_path / "t,fusion=casa,seed=9").mkdir()
    broken = write_job(tmp_path, "fusion=casa", "seed=8")
    (broken / "config.yaml").write_text("trainer: 3\n")
    chosen, left = sweep_exports(tmp_path, "t,*")
    assert [(one.job, one.seed) for one in chosen] == [
        ("t,fusion=casa,seed=1", 1),
        ("t,fusion=insertion,seed=0", 0),
    ]
    why = {one.job: one.why for one in left}
    assert "no export in" in why["t,fusion=casa,seed=0"]
    assert "t,fusion=casa,seed=1 stands for it" in why["t,fusion=casa,seed=2"]
    assert why["t,fusion=casa,seed=9"] == "it never began"
    assert "cannot be read" in why["t,fusion=casa,seed=8"]
    assert set(why) | {one.job for one in chosen} == {p.name for p in tmp_path.iterdir()}
    command = ["streaming", "--sweep", str(tmp_path), "--device", "cpu"]
    options = ["--turns", "5", "--marks", "1,4,9", "--new-tokens", "3", "--prompt-tokens", "6"]
    assert main([*command, *options]) == 0
    printed = capsys.readouterr().out
    assert "left out: t,fusion=casa,seed=9: it never began" in printed
    found = json.loads((tmp_path / "streaming.json").read_text())
    assert found["arguments"]["image_size"] == 84 and MIN_PIXELS < 84**2 <= MAX_PIXELS
    assert set(found["streams"]) == {one.job for one in chosen} == set(found["exports"])
    check_streams(found["streams"], tmp_path)
    assert main([*command, "--fps", "2"]) == 2
    assert "--fps beside --sweep" in capsys.readouterr().err
    assert main([*command, "--image-size", "224"]) == 2
    assert "--image-size is 224" in capsys.readouterr().err
    assert main(["streaming", "--only", "x"]) == 2
    assert "only --sweep reads it" in capsys.readouterr().err


def check_streams(streams: dict[str, Any], sweep: Path) -> None:
    """Tokens are those of the processor's own turns; memory is counted tensor by tensor."""
    for job, image_tokens in (("t,fusion=casa,seed=1", 0), ("t,fusion=insertion,seed=0", 9)):
        stream, export = streams[job], sweep / job / "export"
        processor = load_processor(export)
        begins = [{"role": "user", "content": [{"type": "image", "image": "x"}]}]
        ids = [len(processor.encode(begins, generation_prompt=True).ids)]
        answered = [*begins, {"role": "assistant", "content": ""}]
        ids.append(len(processor.encode(answered * 2 + begins, generation_prompt=True).ids))
        each = ids[1] - len(processor.encode(answered + begins, generation_prompt=True).ids)
        first = ids[0] + 6 + 2 + 3 + image_tokens  # prompt, text, new tokens
        tokens = [turn["cache_tokens"] for turn in stream["turns"]]
        assert tokens == [first - 1 + n * (each + 2 + 3 + image_tokens) for n in range(5)]
        assert set(stream["marks"]) == {"1", "4"} and stream["turns"][0]["memory_bytes"] is None
        mark, turn = stream["marks"]["4"], stream["turns"][3]
        model = load_model(export, torch.float32)
        weights = sum(p.numel() * 4 for p in model.parameters())
        assert mark["memory_bytes"] == weights + turn["cache_bytes"] + turn["state_bytes"]
        assert mark["cache_tokens"] == turn["cache_tokens"]
        assert mark["first_token"] == turn["first_token"]
