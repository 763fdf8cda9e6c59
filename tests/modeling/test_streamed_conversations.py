"""A streamed conversation has the ids of the trained one, in the cache and in what it computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

from casa_train.modeling.processing_casa import CasaProcessor
from data_recipes.synthetic import build_tokenizer
from tests.helpers.chat_tokenizers import legacy_llama, ready, unigram
from tests.helpers.tiny import tiny_model, tiny_text_config

RED = Image.new("RGB", (56, 28), "red")
BLUE = Image.new("RGB", (28, 28), "blue")
Messages = list[dict[str, Any]]


class Scripted(LogitsProcessor):
    """Makes a model say given ids, whatever it thinks."""

    def __init__(self, ids: list[int]) -> None:
        self.ids = list(ids)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        forced = torch.full_like(scores, float("-inf"))
        forced[:, self.ids.pop(0)] = 0
        return forced


@dataclass
class Stage:
    """A model and a processor that fit."""

    model: Any
    processor: CasaProcessor

    def answer(self, words: str) -> list[int]:
        """The ids of an answer as training has them, without its end."""
        turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": words}]
        encoded = self.processor.encode(turn)
        learned = [i for i, a in zip(encoded.ids, encoded.answer, strict=True) if a]
        return learned[:-1]

    def stream(self, cache: Any, batch: Any, said: list[int]) -> None:
        script = LogitsProcessorList([Scripted(said)])
        self.model.generate_from_image(
            **batch,
            past_key_values=cache,
            reset_streaming=False,
            logits_processor=script,
            max_new_tokens=len(said),
            do_sample=False,
        )

    @torch.no_grad()
    def check(self, cache: Any, messages: Messages) -> None:
        """The ids in the cache, and the logits of the next token, are those of the whole."""
        encoded = self.processor.encode(messages)
        # One more turn brings in what the last one left pending.
        more = self.processor.tokenize_messages(
            [{"role": "user", "content": "b"}], suppress_bos_token=True
        )
        self.stream(cache, more, [5])
        whole = self.processor.encode(
            [*messages, {"role": "user", "content": "b"}], generation_prompt=True
        )
        held = cache.casa.history[0].tolist()
        assert held == whole.ids, (
            self.processor.decode(held),
            self.processor.decode(whole.ids),
        )
        assert held[: len(encoded.ids)] == encoded.ids
        full = self.model(
            input_ids=torch.tensor([whole.ids]),
            pixel_values=[self.processor.image_processor.load(i) for i in whole.images],
            image_embeds_insertion_points=[whole.points],
            image_follows=[whole.follows] if any(whole.follows) else None,
        ).logits[0, -1]
        step = self.model(input_ids=torch.tensor([[5]]), past_key_values=cache)
        assert cache.casa.columns == len(whole.ids) + 1
        again = self.model(
            input_ids=torch.tensor([[*whole.ids, 5]]),
            pixel_values=[self.processor.image_processor.load(i) for i in whole.images],
            image_embeds_insertion_points=[whole.points],
            image_follows=[whole.follows] if any(whole.follows) else None,
        ).logits[0]
        assert (again[-2] - full).abs().max() < 1e-4
        assert (step.logits[0, -1] - again[-1]).abs().max() < 1e-4


def qwen_tokenizer() -> Any:
    tokenizer = build_tokenizer()
    special = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": [*special, "<|endoftext|>"]})
    return tokenizer


def stage(name: str, **options: Any) -> Stage:
    tokenizers: dict[str, Any] = {
        "qwen2_5_vl": qwen_tokenizer,
        "demo": build_tokenizer,
        "helium": unigram,
        "helium, BPE": legacy_llama,
    }
    tokenizer = tokenizers[name]()
    processor = CasaProcessor(tokenizer, 7056, ready(name.partition(",")[0]))
    model = tiny_model(
        options.pop("mechanism", "casa"),
        text_config=tiny_text_config(vocab_size=len(tokenizer)),
        **options,
    )
    model.config.pre_image_tokens = processor.pre_image_tokens
    model.config.post_image_tokens = processor.post_image_tokens
    model.config.answer_end_token = processor.answer_end_token
    others = [i for i in processor._text_ids.special.values() if i != processor.answer_end_token]
    model.generation_config.eos_token_id = [processor.answer_end_token, others[-1]]
    return Stage(model, processor)


def ask(words: str, *images: Any) -> dict[str, Any]:
    shown = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*shown, {"type": "text", "text": words}]}


NAMES = ["qwen2_5_vl", "demo", "helium", "helium, BPE"]


@pytest.mark.parametrize(
    ("end", "end_answer"),
    [("the template's", False), ("another", False)]
    + [(end, True) for end in ("the template's", "another", "none")],
)
@pytest.mark.parametrize("name", NAMES)
def test_a_streamed_conversation_has_the_trained_ids(name: str, end: str, end_answer: bool) -> None:
    """However its answers ended: by the template's token, another end of text, or cut off, where
    the caller brings the end; he may bring it in any case.
    """
    on = stage(name)
    ends = on.model.generation_config.eos_token_id
    said_end = {"the template's": [ends[0]], "another": [ends[1]], "none": []}[end]
    system = {"role": "system", "content": "Be brief."}
    turns = [
        ([system, ask("What?", RED)], "a red one"),
        ([ask("And now? ", BLUE)], "blue"),
        ([ask("\nSure?")], "yes"),
    ]
    cache = DynamicCache()
    messages: Messages = []
    for asked, words in turns:
        batch = on.processor.tokenize_messages(
            asked, suppress_bos_token=bool(messages), end_answer=bool(messages) and end_answer
        )
        on.stream(cache, batch, [*on.answer(words), *said_end])
        messages += [*asked, {"role": "assistant", "content": words}]
    if end == "none":
        finish = on.processor.tokenize_messages([ask("b")], True, end_answer=True)
        on.stream(cache, finish, [*on.answer("c"), ends[0]])
        messages += [ask("b"), {"role": "assistant", "content": "c"}]
    on.check(cache, messages)


@pytest.mark.parametrize("scope", ["frame", "all_frames"])
@pytest.mark.parametrize(
    ("name", "ended"), [*((name, False) for name in NAMES), ("qwen2_5_vl", True)]
)
def test_live_captions_are_one_long_turn(name: str, ended: bool, scope: str) -> None:
    """As clients of the published models stream them: no opening and no end around frames. Where a
    model ends its turn too early, the next frame takes the end back.
    """
    on = stage(name, window_scope=scope)
    end = on.model.generation_config.eos_token_id[1 if ended else 0]
    frames = [RED, BLUE, RED]
    captions = [" one ...", " two ...", " three"]
    question = ask("Comment.")
    live: list[dict[str, Any]] = []
    for frame, words in zip(frames, captions, strict=True):
        live += [{"type": "video", "video": [frame]}, {"type": "text", "text": words}]
    trained = [question, {"role": "assistant", "content": live}]
    encoded = on.processor.encode(trained)
    assert encoded.follows == [False, True, True]
    bounds = [*encoded.points, encoded.turn_ends[0]]
    said = [
        [i for i, a in zip(encoded.ids[b:e], encoded.answer[b:e], strict=True) if a]
        for b, e in zip(bounds, bounds[1:], strict=False)
    ]
    said[-1].pop()  # its end

    cache = DynamicCache()
    first = on.processor.apply_chat_template(
        [question, {"role": "assistant", "content": live[:1]}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        continue_final_message=True,
    )
    start, stop = on.processor.asst_start_tokens, on.processor.asst_end_tokens
    on.stream(cache, first, [*said[0], *([end] if ended else [])])
    on.processor.asst_start_tokens, on.processor.asst_end_tokens = [], []
    for i in (1, 2):
        frame = [{"role": "assistant", "content": live[2 * i : 2 * i + 1]}]
        batch = on.processor.tokenize_messages(frame, suppress_bos_token=True)
        assert (
            batch["input_ids"][0].tolist()
            == [*on.processor.pre_image_tokens, *on.processor.post_image_tokens]
            or name.startswith("helium")
            or name == "demo"
        )
        last = [on.model.config.answer_end_token] if i == 2 else [end] if ended else []
        on.stream(cache, batch, [*said[i], *last])
    on.processor.asst_start_tokens, on.processor.asst_end_tokens = start, stop
    on.check(cache, trained)


def test_a_live_turn_that_ended_too_early_goes_on_without_tokens_around_images() -> None:
    """Nothing is left to predict from but the end itself, which stays."""
    on = stage("demo")
    cache = DynamicCache()
    end = on.model.config.answer_end_token
    on.stream(cache, on.processor.tokenize_messages([ask("Comment.", RED)]), [7, end])
    on.processor.asst_start_tokens, on.processor.asst_end_tokens = [], []
    frame = [{"role": "assistant", "content": [{"type": "image", "image": BLUE}]}]
    batch = on.processor.tokenize_messages(frame, suppress_bos_token=True)
    on.stream(cache, batch, [8, 9])
    assert cache.casa.history[0, -3:].tolist() == [7, end, 8]


def test_qwens_later_turns_read_as_trained() -> None:
    """No second system turn, and the line break behind the end token is there."""
    on = stage("qwen2_5_vl")
    batch = on.processor.tokenize_messages([ask("Hi")], suppress_bos_token=True)
    assert on.processor.decode(batch["input_ids"][0]) == (
        "\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    cut = on.processor.tokenize_messages([ask("Hi")], suppress_bos_token=True, end_answer=True)
    assert on.processor.decode(cut["input_ids"][0]).startswith("<|im_end|>\n<|im_start|>user")


def test_a_client_that_brings_the_last_token_itself_doubles_nothing() -> None:
    """Newer clients prepend the last stop token to the next turn and shift its points."""
    on = stage("qwen2_5_vl")
    end = on.model.config.answer_end_token
    cache = DynamicCache()
    first, second = [ask("What?", RED)], [ask("And now?", BLUE)]
    on.stream(cache, on.processor.tokenize_messages(first), [*on.answer("red"), end])
    batch = on.processor.tokenize_messages(second, suppress_bos_token=True)
    batch["input_ids"] = torch.cat([torch.tensor([[end]]), batch["input_ids"]], 1)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    points = batch["image_embeds_insertion_points"]
    batch["image_embeds_insertion_points"] = [[p + 1 for p in row] for row in points]
    on.stream(cache, batch, [*on.answer("blue"), end])
    said = [{"role": "assistant", "content": words} for words in ("red", "blue")]
    on.check(cache, [*first, said[0], *second, said[1]])
