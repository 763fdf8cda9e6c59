"""`evaluate` on live captions: clips side by side are each alone, blind ones swap frames."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf

from casa_train.caption.captioner import Captioner, CaptionStreams
from casa_train.caption.options import CaptionOptions
from casa_train.config.compose import compose_config
from casa_train.data.prepared.shards import Split
from casa_train.evaluate.__main__ import live_table, main
from casa_train.evaluate.evaluation import scores_said
from casa_train.evaluate.exact_match import held_out_questions
from casa_train.evaluate.live_clips import evaluate_clips, first_clips, other_frames
from casa_train.evaluate.shares import show_image
from casa_train.report.__main__ import main as report
from data_recipes.__main__ import main as recipes
from data_recipes.synthetic_motion import PROMPT
from tests.helpers.commands import TINY, on_data
from tests.helpers.tiny_export import write_tiny_export


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A split of rendered films, by the published recipe."""
    out = tmp_path_factory.mktemp("live")
    films = ["--clips", "7", "--validation", "1", "--seed", "2", "--side", "56", "--workers", "1"]
    assert recipes(["synthetic_clips", "--out", str(out / "films"), *films]) == 0
    tokens = ["--tokenizer", str(out / "films/tokenizer"), "--template", "demo_live"]
    paths = ["--source", str(out / "films/train"), "--out", str(out / "live")]
    assert recipes(["live_whisperx", *paths, *tokens, "--workers", "1"]) == 0
    return out / "live" / "train"


@pytest.fixture(scope="module")
def captioner(tmp_path_factory: pytest.TempPathFactory) -> Captioner:
    export = write_tiny_export(tmp_path_factory.mktemp("export") / "export")
    return Captioner.load(export, CaptionOptions(max_new_tokens=5))


def test_clips_are_read_with_their_words_and_times(live: Path) -> None:
    split = Split(live)
    skipped: Counter[str] = Counter()
    clips = first_clips({"live": split}, {"live": None}, 5, skipped)
    assert len(clips) == 5 and not skipped
    for clip in clips:
        assert len(clip.frames) == len(clip.times) == len(clip.due) > 10
        assert all(
            b - a == pytest.approx(0.5) for a, b in zip(clip.times, clip.times[1:], strict=False)
        )
        assert clip.prompt == PROMPT
        assert any(clip.due) and not any("..." in words for words in clip.due)
    assert len(first_clips({"live": split}, {"live": 2}, 5, skipped)) == 2
    swapped = other_frames(clips)
    for clip, other, frames in zip(clips, [*clips[1:], clips[0]], swapped, strict=True):
        assert len(frames) == len(clip.frames)
        shared = min(len(frames), len(other.frames))
        assert frames[:shared] == list(other.frames[:shared])


def test_clips_side_by_side_are_each_alone(live: Path, captioner: Captioner) -> None:
    clips = first_clips({"live": Split(live)}, {"live": None}, 4, Counter())
    model, processor = captioner.model, captioner.processor
    together = evaluate_clips(clips, model, processor, 3)
    assert [c["id"] for c in together["captions"]] == [clip.id for clip in clips]
    own = captioner.asking(max_new_tokens=CaptionOptions().max_new_tokens)
    for clip, found in zip(clips, together["captions"], strict=True):
        streams = own.open(prompts=[clip.prompt])
        assert found["said"] == [streams.caption([frame])[0].text for frame in clip.frames]
        assert found["due"] == list(clip.due)
    assert together["clips"] == 4 and together["match"] == 0.0  # a model with random weights


def test_a_model_that_says_what_is_due_scores_one_and_blind_less(
    live: Path, captioner: Captioner, monkeypatch: pytest.MonkeyPatch
) -> None:
    clips = first_clips({"live": Split(live)}, {"live": None}, 6, Counter())
    words = {
        id(frame): due for clip in clips for frame, due in zip(clip.frames, clip.due, strict=True)
    }
    plain = CaptionStreams._caption

    def told(self: Any, frames: Any, heard: Any, deadline: Any) -> Any:
        found = plain(self, frames, heard, deadline)
        return [replace(c, text=words[id(frame)]) for c, frame in zip(found, frames, strict=True)]

    monkeypatch.setattr(CaptionStreams, "_caption", told)
    scores = evaluate_clips(clips, captioner.model, captioner.processor, 4)
    assert scores["match"] == 1.0 and scores["found"] == 1.0
    assert scores["median_delay_frames"] == 0 and scores["false_words"] == 0
    assert scores["blind_match"] < 0.5


def test_of_one_clip_nothing_is_blind(live: Path, captioner: Captioner) -> None:
    clips = first_clips({"live": Split(live)}, {"live": None}, 1, Counter())
    scores = evaluate_clips(clips, captioner.model, captioner.processor, 4)
    assert scores["blind_match"] is None and scores["match"] == 0.0
    assert scores_said({"exact_match": None, "live": scores}) == ["live captions 0.000"]
    assert " - " in live_table(scores)


def test_frames_in_answers_ask_nothing(live: Path, data_dir: Path) -> None:
    """A live split beside one with questions takes none of their places."""
    splits = {"live": Split(live), "pictures": Split(data_dir / "validation")}
    for name, split in splits.items():
        rows = np.arange(len(split))[1:]
        assert len(show_image(split, rows)) == (0 if name == "live" else len(rows))
    limits = dict.fromkeys(splits)
    questions = held_out_questions(splits, limits, 8, Counter())
    assert len(questions) == 8 and all(q.id.startswith("pictures/") for q in questions)


def stored(run: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((run / "evaluation.json").read_text())
    return result


def test_the_command_scores_live_splits_beside_questions_and_alone(
    live: Path, tmp_path: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "a run"
    overrides = ["+experiment=demo", *TINY, *on_data(data_dir), "evaluation.max_samples=4"]
    config = compose_config([*overrides, "evaluation.attention_samples=2"])
    write_tiny_export(run / "export")
    (run / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(asdict(config))))
    metrics = {"step": 1, "loss": 2.0, "seconds": 0.5, "sources": {}}
    (run / "metrics.jsonl").write_text(json.dumps(metrics) + "\n")
    own = f"+data.validation.films.path={live}"
    assert main([str(run), own, "evaluation.live_clips=3"]) == 0
    both = stored(run)
    assert both["questions"] == 4 and both["live"]["clips"] == 3
    printed = capsys.readouterr().out
    assert "overall" in printed and "false words" in printed
    assert report([str(run)]) == 0
    assert "live captions 0.000" in capsys.readouterr().out
    page = (run / "report.html").read_text()
    assert "<h2>Live captions</h2>" in page and both["live"]["captions"][0]["id"] in page

    assert main([str(run), own, "data.validation.synthetic=null", "evaluation.live_clips=2"]) == 0
    alone = stored(run)
    assert alone["questions"] == 0 and alone["exact_match"] is None and alone["live"]["clips"] == 2
    assert "exact match" not in capsys.readouterr().out
    assert report([str(run)]) == 0
    assert "exact match" not in capsys.readouterr().out

    nothing = [own, "data.validation.synthetic=null", "evaluation.live_clips=0"]
    assert main([str(run), *nothing]) == 2
    assert "no question about an image and no live captions" in capsys.readouterr().err
