"""Streams of captions: the ids of training, options that remember across frames, batches."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from casa_train.caption.captioner import Captioner, CaptionStreams
from casa_train.caption.options import PUBLISHED, TURN_END, CaptionOptions
from casa_train.caption.token_choice import TokenChoice
from casa_train.data.sample import ImageSlot, Sample, Turn
from casa_train.data.schemas.video_rows import FRAME_END, live_whisperx
from casa_train.errors import UserError
from casa_train.modeling.processing_casa import CasaProcessor
from data_recipes.synthetic import build_tokenizer
from tests.helpers.chat_tokenizers import legacy_llama, ready, unigram
from tests.helpers.tiny import tiny_model, tiny_text_config
from tests.helpers.tiny_export import write_tiny_export

TOKENIZERS: dict[str, Any] = {"demo": build_tokenizer, "helium": unigram}
TOKENIZERS["helium, BPE"] = legacy_llama


def pictures(count: int, seed: int = 0) -> list[Image.Image]:
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 56, 84, 3), dtype=np.uint8)
    return [Image.fromarray(p) for p in pixels]


@functools.cache
def processor_of(name: str) -> CasaProcessor:
    if name == "chatml":
        tokenizer = build_tokenizer()
        names = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
        tokenizer.add_special_tokens({"additional_special_tokens": names})
        return CasaProcessor(tokenizer, 7056, ready("qwen2_5_vl"))
    return CasaProcessor(TOKENIZERS[name](), 7056, ready(name.partition(",")[0]))


def captioner(
    name: str = "demo", mechanism: str = "casa", scope: str = "frame", **options: Any
) -> Captioner:
    processor = processor_of(name)
    text = tiny_text_config(vocab_size=len(processor.tokenizer))
    torch.manual_seed(5)
    model = tiny_model(
        mechanism, text_config=text, **({} if scope == "frame" else {"window_scope": scope})
    )
    model.generation_config.eos_token_id = processor.answer_end_token
    return Captioner(model.eval(), processor, CaptionOptions(**{"prompt": "Go on.", **options}))


class Scripted(CaptionStreams):
    """Says given ids, whatever the model thinks, and keeps the logits that it saw."""

    script: list[list[int]]
    seen: list[Tensor]

    def _choose(self, logits: Tensor, open_: Sequence[bool]) -> list[int]:
        self.seen.append(logits)
        return [self.script[row].pop(0) if goes_on else 0 for row, goes_on in enumerate(open_)]


def scripted(on: Captioner, *script: list[int]) -> Scripted:
    streams = Scripted(on, [on.options.prompt] * len(script))
    streams.script, streams.seen = [list(ids) for ids in script], []
    return streams


def trained(
    on: Captioner, words: Sequence[str], frames: Sequence[Any], until: int | None = None
) -> Any:
    """The sample of a clip as training encodes it, by the schema of Live-WhisperX."""
    stream = [[i * 0.5, i * 0.5, word] for i, said in enumerate(words) for word in said.split()]
    clip = {"type": "video", "video": "a.mp4", "video_start": 0, "video_end": len(words) / 2}
    asked = {"type": "text", "text": on.options.prompt}
    messages = [
        {"role": "user", "content": [clip, asked]},
        {"role": "assistant", "content": [{"type": "text_stream", "text_stream": stream}]},
    ]
    row = {"messages": messages, "frame_times": [i * 0.5 for i in range(len(words))]}
    sample = live_whisperx("clip", row, [b""] * len(words))
    return on.processor.encode(sample.messages(list(frames)))


def spoken(on: Captioner, encoded: Any) -> list[list[int]]:
    """What is learned of each frame, the end of the answer too."""
    bounds = [*encoded.points, len(encoded.ids)]
    return [
        [i for i, a in zip(encoded.ids[b:e], encoded.answer[b:e], strict=True) if a]
        for b, e in zip(bounds, bounds[1:], strict=False)
    ]


@pytest.mark.parametrize("scope", ["frame", "all_frames"])
@pytest.mark.parametrize("name", ["demo", "chatml", "helium", "helium, BPE"])
@torch.no_grad()
def test_a_stream_has_the_ids_and_logits_of_training(name: str, scope: str) -> None:
    on = captioner(name, scope=scope)
    frames = pictures(5)
    words = ["red", "", "a blue square", "", "left"]
    whole = trained(on, words, frames)
    said = spoken(on, whole)
    end = said[-1].pop()
    streams = scripted(on, [i for ids in said for i in ids] + [end])
    found = [streams.caption([frame])[0] for frame in frames]
    assert [caption.text for caption in found] == words
    assert [caption.tokens for caption in found] == [
        len(ids) for ids in [*said[:-1], [*said[-1], end]]
    ]
    assert not any(caption.cut for caption in found)
    logits = on.model(
        input_ids=torch.tensor([whole.ids]),
        pixel_values=[on.processor.image_processor.load(frame) for frame in frames],
        image_embeds_insertion_points=[whole.points],
        image_follows=[whole.follows],
    ).logits[0]
    # What a template's answers open with stands before the first frame: it is given, not said.
    learned = [i - 1 for i, a in enumerate(whole.answer) if a and i >= whole.points[0]]
    assert len(learned) == len(streams.seen)
    assert (logits[learned] - torch.cat(streams.seen)).abs().max() < 1e-4
    history = streams.cache.casa.history[0].tolist()
    assert history == whole.ids[: len(history)] and len(history) >= len(whole.ids) - 2


def test_what_is_cut_keeps_its_words_and_ends_as_frames_do() -> None:
    """By the number of tokens, by time after one token, and where a model ends its turn."""
    encode = processor_of("demo").tokenizer.encode
    words, more = encode(" red blue green gray circle"), encode(" circle")
    on = captioner("demo", max_new_tokens=len(words))
    end, turn_end = on.frame_end, on.processor.answer_end_token
    assert len(more) + len(end) <= len(words)
    streams = scripted(on, [*words, *more[:1], turn_end, *more, *end])
    cut = streams.caption(pictures(1))[0]
    assert cut.cut and cut.text == "red blue green gray circle" and cut.tokens == len(words)
    late = streams.caption(pictures(1), deadline=time.monotonic() - 1)[0]
    assert late.cut and late.tokens == 1
    ended = streams.caption(pictures(1))[0]
    assert not ended.cut and ended.text == "" and ended.tokens == 1
    last = streams.caption(pictures(1))[0]
    assert (last.text, last.cut) == ("circle", False)
    history = streams.cache.casa.history[0].tolist()
    expected = [*words, *end, *more[:1], *end, *end, *more, *end[:-1]]
    assert history[-len(expected) :] == expected


def test_the_released_models_end_frames_by_the_token_that_ends_a_turn() -> None:
    on = captioner("chatml", frame_end=TURN_END)
    end = on.processor.answer_end_token
    words = on.processor.tokenizer.encode(" red ...")
    streams = scripted(on, [*words, end, end, end])
    assert streams.caption(pictures(1))[0].text == "red ..."
    assert streams.caption(pictures(1))[0].text == ""
    streams.caption(pictures(1))
    pre, post = on.processor.pre_image_tokens, on.processor.post_image_tokens
    expected = [*words, end, *pre, *post, end, *pre, *post]
    assert streams.cache.casa.history[0].tolist()[-len(expected) :] == expected


def test_words_put_into_its_mouth_are_heard_and_read() -> None:
    on = captioner("demo", begin="In this video")
    streams = scripted(on, on.processor.tokenizer.encode(" red ... ..."))
    heard: list[str] = []
    first = streams.caption(pictures(1), lambda row, piece: heard.append(piece))[0]
    assert first.text == "In this video red" == "".join(heard)
    ids = streams.cache.casa.history[0].tolist()
    assert "In this video red" in on.processor.decode(ids)
    assert streams.caption(pictures(1))[0].text == ""


@pytest.mark.parametrize("name", ["demo", "helium", "helium, BPE"])
def test_words_put_into_its_mouth_stand_apart_from_the_first_that_it_says(name: str) -> None:
    """Decoders of SentencePiece drop the space that a text begins with."""
    on = captioner(name, begin="In this video", max_new_tokens=40)
    frames = [{"type": "video", "video": [None]}]
    told = [on.options.begin, f"{on.options.begin} é red{FRAME_END}"]
    before, whole = (
        on.processor.encode(
            [{"role": "assistant", "content": [*frames, {"type": "text", "text": text}]}],
            continue_final=True,
        ).ids
        for text in told
    )
    assert whole[: len(before)] == before
    heard: list[str] = []
    streams = scripted(on, whole[len(before) :])
    first = streams.caption(pictures(1), lambda row, piece: heard.append(piece))[0]
    assert first.text == "In this video é red" == "".join(heard) and not first.cut


def test_what_is_heard_is_what_stays() -> None:
    """Nothing of a frame's end and no half character is heard, and all of the words are."""
    on = captioner("demo", max_new_tokens=40)
    ids = on.processor.tokenizer.encode(" a.b é ..c 日本 ...")
    pieces: list[str] = []
    caption = scripted(on, ids).caption(pictures(1), lambda row, piece: pieces.append(piece))[0]
    assert caption.text == "a.b é ..c 日本" and "".join(pieces).strip() == caption.text
    assert "\ufffd" not in "".join(pieces) and len(pieces) > 5


def test_half_a_character_that_is_cut_is_neither_heard_nor_written() -> None:
    ids = processor_of("demo").tokenizer.encode(" red \u65e5")
    on = captioner("demo", max_new_tokens=len(ids) - 1)
    pieces: list[str] = []
    caption = scripted(on, ids).caption(pictures(1), lambda row, piece: pieces.append(piece))[0]
    assert caption.cut and caption.text == "red" and "".join(pieces) == " red"


def test_a_cut_frame_ends_with_the_token_that_the_model_ends_frames_with() -> None:
    """A released model has several; another one than its own would look like another document."""
    on = captioner("chatml", frame_end=TURN_END, max_new_tokens=2)
    first = on.processor.answer_end_token
    own, *words = on.processor.tokenizer.encode("<|endoftext|> red circle left".replace(" ", ""))
    on.model.generation_config.eos_token_id = [first, own]
    on = Captioner(on.model, on.processor, on.options)  # of a model that has both
    assert own != first and len(words) >= 4
    streams = scripted(on, [*words[:2], own, *words[2:4], own])
    cuts = [streams.caption(pictures(1))[0].cut for _ in range(4)]
    assert cuts == [True, False, True, False]
    pre, post = on.processor.pre_image_tokens, on.processor.post_image_tokens
    between = [*pre, *post]
    expected = [*words[:2], first, *between, own, *between, *words[2:4], own, *between]
    assert streams.cache.casa.history[0].tolist()[-len(expected) :] == expected


def test_the_speed_of_a_stream_is_its_own_beside_a_longer_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on = captioner("demo", max_new_tokens=12)
    encode = processor_of("demo").tokenizer.encode
    short, long = encode(" ..."), encode(" red blue green gray circle")[:12]
    assert len(short) == 4 and len(long) == 12
    seconds = iter(range(100))
    clock = SimpleNamespace(perf_counter=lambda: next(seconds), monotonic=time.monotonic)
    monkeypatch.setattr("casa_train.caption.captioner.time", clock)
    found = scripted(on, short, long).caption(pictures(2))
    # One token a second of this clock, which begins to count with the first one.
    assert [caption.tokens for caption in found] == [4, 12]
    assert [caption.tokens_per_second for caption in found] == [1.0, 1.0]


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @functools.cache
    def write(mechanism: str) -> Path:
        return write_tiny_export(tmp_path_factory.mktemp("caption") / mechanism, mechanism)

    return write


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.8, "top_k": 30, "repetition_penalty": 1.4, "ngram": 2, "stop_bias": 1.2},
    ],
    ids=["greedy", "drawn"],
)
@pytest.mark.parametrize("mechanism", ["casa", "insertion", "hyper_attention"])
def test_a_batch_of_streams_equals_each_alone(
    exports: Any, mechanism: str, options: dict[str, Any]
) -> None:
    """With prompts of their own, and after one of them has ended."""
    on = Captioner.load(exports(mechanism), CaptionOptions(max_new_tokens=6, **options))
    prompts = ["What?", "Tell me all that there is.", "And?"]
    clips = [pictures(5, seed) for seed in range(3)]
    alone = []
    for prompt, clip in zip(prompts, clips, strict=True):
        streams = on.open(prompts=[prompt])
        alone.append([streams.caption([frame])[0] for frame in clip])
    streams, left = on.open(prompts=prompts), [0, 1, 2]
    for i in range(5):
        if i == 3:
            streams.keep([0, 2])
            left = [0, 2]
        for row, caption in zip(left, streams.caption([clips[r][i] for r in left]), strict=True):
            expected = alone[row][i]
            assert (caption.text, caption.tokens) == (expected.text, expected.tokens)
            assert caption.cache_tokens == expected.cache_tokens
    streams.close()
    assert len(streams) == 0 and streams.cache.get_seq_length() == 0


def test_a_streams_cache_grows_with_its_words_alone(exports: Any) -> None:
    """Of CASA; insertion keeps all that it saw."""
    grown = {}
    for mechanism in ("casa", "insertion"):
        on = Captioner.load(exports(mechanism), CaptionOptions(max_new_tokens=4))
        streams = on.open()
        found = [streams.caption([frame])[0] for frame in pictures(4)]
        around = len(on.processor.pre_image_tokens) + len(on.processor.post_image_tokens)
        text = around + 4 + len(on.frame_end)
        grown[mechanism] = {
            b.cache_tokens - a.cache_tokens - text for a, b in zip(found, found[1:], strict=False)
        }
    assert grown == {"casa": {0}, "insertion": {6}}


def choice(exempt: Sequence[int] = (), stop: Sequence[int] = (), **options: Any) -> TokenChoice:
    return TokenChoice(CaptionOptions(**options), exempt, stop)


def test_penalties_remember_and_decay() -> None:
    """Counts decay with every token, are bounded, and ends of frames have none."""
    picks = choice(exempt=[3], repetition_penalty=2.0, penalty_decay=0.5, penalty_most=1.25)
    logits = torch.tensor([4.0, -1.0, 2.1, 3.0])
    assert picks.choose(logits) == 0
    picks.said(0)
    assert picks.choose(logits) == 3  # 4 / 2 is below 3
    picks.said(3)
    picks.said(3)
    assert picks.choose(logits) == 0  # 4 / 2 ** 0.25 is above it again
    for _ in range(9):
        picks.said(0)
    assert picks.choose(logits - torch.tensor([0.0, 0.0, 0.0, 1.1])) == 2  # 4 / 2 ** 1.25 = 1.68
    negative = choice(repetition_penalty=3.0, penalty_decay=0.9)
    negative.said(0)
    assert negative.choose(torch.tensor([-1.0, -2.0])) == 1


def test_a_stop_bias_above_one_ends_frames_sooner_on_either_side_of_zero() -> None:
    for logits, biased, plain in (([2.0, 2.5], 0, 1), ([-2.5, -2.0], 0, 1)):
        assert choice(stop=[0], stop_bias=1.5).choose(torch.tensor(logits)) == biased
        assert choice(stop=[0]).choose(torch.tensor(logits)) == plain
    assert choice(stop=[0], stop_bias=0.5).choose(torch.tensor([2.5, 2.0])) == 1


def test_an_ngram_is_said_once_within_its_window_but_for_ends_of_frames() -> None:
    picks = choice(exempt=[9], ngram=3, ngram_window=6)
    logits = torch.zeros(10)
    logits[5], logits[2] = 2, 1
    for token in (3, 4, 5, 3, 4):
        picks.said(token)
    assert picks.choose(logits) == 2
    for token in (2, 2, 3, 4):  # the first 3 4 5 has left the window
        picks.said(token)
    assert picks.choose(logits) == 5
    silent = choice(exempt=[9], ngram=3, ngram_window=6)
    for _ in range(5):
        silent.said(9)
    logits[9] = 3
    assert silent.choose(logits) == 9


def test_drawn_tokens_follow_temperature_and_top_k() -> None:
    logits = torch.tensor([1.0, 0.0, 3.0, 2.0])
    drawn = choice(temperature=2.0, top_k=3, seed=4)
    counts = np.bincount([drawn.choose(logits) for _ in range(4000)], minlength=4) / 4000
    expected = torch.tensor([1.0, -torch.inf, 3.0, 2.0]).div(2.0).softmax(0).numpy()
    assert np.abs(counts - expected).max() < 0.03
    again = choice(temperature=2.0, top_k=3, seed=4)
    same = choice(temperature=2.0, top_k=3, seed=4)
    assert [again.choose(logits) for _ in range(20)] == [same.choose(logits) for _ in range(20)]


@pytest.mark.parametrize(
    ("field", "value"),
    [("frame_end", " "), ("max_new_tokens", 0), ("temperature", -1.0), ("top_k", -2)]
    + [("stop_bias", 0.0), ("repetition_penalty", float("nan")), ("penalty_decay", 1.5)]
    + [("penalty_most", -1.0), ("ngram", -1), ("ngram_window", 3)],
)
def test_values_that_cannot_be_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"{field} is {value!r}; expected"):
        CaptionOptions(**{"ngram": 4, field: value}).check()


def test_the_published_values_are_ones_that_can_be() -> None:
    options = CaptionOptions(**PUBLISHED)
    options.check()
    assert not options.greedy and CaptionOptions().greedy


def test_a_template_without_turns_is_refused(tmp_path: Path) -> None:
    export = write_tiny_export(tmp_path / "bare", template={"bos": "<|bos|>"})
    with pytest.raises(UserError, match="no chat template for streams") as refused:
        Captioner.load(export, CaptionOptions())
    assert str(export) in str(refused.value)


def test_a_directory_that_is_no_export_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no export of this project"):
        Captioner.load(tmp_path, CaptionOptions())


def test_the_schema_writes_the_end_that_the_captioner_waits_for() -> None:
    turn = Turn(("a",), "x ...y", live=(ImageSlot(0), "x" + FRAME_END, ImageSlot(1), "y"))
    sample = Sample("k", "s", (turn,), (b"", b""), video=True)
    assert sample.messages()[1]["content"][1]["text"].endswith(CaptionOptions().frame_end)
