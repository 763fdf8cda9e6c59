"""Chat templates: ready files, fields taken from a tokenizer's own jinja, and the two compared.

A tokenizer's own template is a program. Its turns are found by rendering probe conversations and
looking at what stands around their texts; what no turn can express is named (`left_out`).
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from casa_train.config.ready_templates import NAMES, ready_names
from casa_train.errors import UserError
from casa_train.modeling.processing_casa import CasaProcessor, ChatTemplate

TURNS = ("user_start", "user_end", "assistant_start", "assistant_end")
# A template that writes today's date is given this one, so that a run reads the same every day.
DATE = "26 Jul 2024"
ALWAYS = "{%- macro strftime_now(format) -%}" + DATE + "{%- endmacro -%}"  # in the library's place
# What probe texts are: words that no template has.
SYSTEM, ASKED, AGAIN, SAID, MORE = "Sphinxq", "Quartzq", "Vexedq", "Jumbledq", "Zephyrq"
# What a template may do beyond turns, and the words in its jinja that tell.
BEYOND = {
    "tools": r"\btools\b|tool_calls",
    "documents": r"\bdocuments\b",
    "thinking": r"enable_thinking|reasoning_content|</?think>",
    f"dates (today is always {DATE})": r"strftime_now|date_string",
}

# What special tokens look like in the templates of published models.
SPECIAL = re.compile(r"<\|[^|<>]+\|>|<｜[^<>]+｜>|</?s>|<(?:bos|eos|pad|unk)>|<[a-z]+(?:_[a-z]+)+>")

NO_SYSTEM = (
    "system messages (without a turn of their own; here their text stands before a question)"
)

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Resolved:
    """The template that is in force.

    :param own: the tokenizer's own jinja; None where it brings none.
    :param left_out: what the own template does that turns do not express.
    """

    template: ChatTemplate
    own: str | None = None
    left_out: tuple[str, ...] = ()


def resolve(given: Mapping[str, Any], tokenizer: Any, name: str, setting: str) -> Resolved:
    """The given fields, on top of the tokenizer's own template.

    :param given: fields by name; None counts as not given.
    :param name: of the tokenizer; an export of this project has its template written down.
    :raises UserError: nothing given and a tokenizer without a template, or fields of another type.
    """
    chosen = {key: value for key, value in given.items() if value is not None}
    own = own_jinja(tokenizer)
    base, left_out = ChatTemplate(), tuple[str, ...]()
    stored = Path(name) / "processor_config.json"
    exported = json.loads(stored.read_text()).get("template") if stored.is_file() else None
    try:
        if isinstance(exported, dict):
            base = ChatTemplate(**exported)
        elif own is not None and not set(NAMES) <= set(chosen):
            base, left_out = derive(own, tokenizer, setting, needed=not set(TURNS) <= set(chosen))
        elif not set(TURNS) & set(chosen):
            raise UserError(
                f"{setting} names no template, and the tokenizer {name} brings none of its own; "
                f"expected the literals around turns. Choose one of {', '.join(ready_names())}, or "
                f"set {', '.join(TURNS)}."
            )
        template = replace(base, **chosen)
        _check_tokens(template, tokenizer, own, name, setting)
        return Resolved(template, own, left_out)
    except (TypeError, ValueError) as error:
        raise UserError(f"{setting}: {error}.") from error


def _check_tokens(
    template: ChatTemplate, tokenizer: Any, own: str | None, name: str, setting: str
) -> None:
    """:raises UserError: what looks like a special token but is none, nor the own template's."""
    vocabulary = tokenizer.get_vocab()
    for field, literal in template.pieces.items():
        for token in SPECIAL.findall(literal):
            # In a vocabulary it may be a word like others, which text is never read as.
            read = tokenizer.encode(token, add_special_tokens=False)
            if vocabulary.get(token) not in read and token not in (own or ""):
                where = f"{setting}: {field}" if setting.startswith("-") else f"{setting}.{field}"
                raise UserError(
                    f"{where} uses the special token {token!r}, which the tokenizer {name} does "
                    "not have; expected tokens of its vocabulary. Choose the template of this "
                    "tokenizer (auto takes the one it brings), or add the token to it."
                )


def own_jinja(tokenizer: Any) -> str | None:
    """A tokenizer's own chat template; of several named ones the default."""
    own = getattr(tokenizer, "chat_template", None)
    if isinstance(own, list):  # as files write several
        own = {entry["name"]: entry["template"] for entry in own}
    return own.get("default") if isinstance(own, dict) else own


# ----------------------------------------------------------------------------------- deriving


def derive(
    own: str, tokenizer: Any, setting: str = "model.template", needed: bool = True
) -> tuple[ChatTemplate, tuple[str, ...]]:
    """The turns of a tokenizer's own template, and names of what they leave out.

    :param needed: whether turns that cannot be found are an error; otherwise they are left out.
    :raises UserError: a template that cannot be rendered, or that has no turns to be found.
    """
    left_out = [name for name, words in BEYOND.items() if re.search(words, own)]

    def text(messages: Messages, **options: Any) -> str:
        return render(own, tokenizer, messages, **options)

    question, answer = _user(ASKED), _assistant(SAID)
    try:
        opening, user_end = _around(text([question]), ASKED)
        first, between, assistant_end = _around(text([question, answer]), ASKED, SAID)
        _, _, inner, _, _ = _around(
            text([question, answer, _user(AGAIN), _assistant(MORE)]), ASKED, SAID, AGAIN, MORE
        )
        if not (first == opening and between.startswith(user_end)):
            raise ValueError(f"a question renders as {text([question])!r} or, answered, otherwise")
        if not inner.startswith(assistant_end):
            raise ValueError(
                f"an answer ends with {assistant_end!r}, or in front of a question with {inner!r}"
            )
    except Exception as error:  # jinja's own, or what a template raises
        if not needed:
            return ChatTemplate(), (*left_out, "turns (they are not found in it)")
        raise UserError(
            f"{setting}: the tokenizer's own chat template cannot be taken apart into turns "
            f"({str(error).rstrip('.')}); expected one that renders questions and answers in turns "
            f"of their own. Choose one of {', '.join(ready_names())}, or set {', '.join(TURNS)}."
        ) from error
    assistant_start, answer_start = between[len(user_end) :], ""
    prompt = text([question], add_generation_prompt=True)[len(opening + ASKED + user_end) :]
    if assistant_start.startswith(prompt):  # what is generated after it belongs to the answer
        assistant_start, answer_start = prompt, assistant_start[len(prompt) :]
    else:
        left_out.append(f"another opening where an answer is generated ({prompt!r})")
    user_start = inner[len(assistant_end) :]
    if not opening.endswith(user_start):  # the first turn differs: then all open like the first
        left_out.append("another opening of later questions")
        user_start = opening[len(opening) - len(_common_end(opening, user_start)) :]
    opening = opening[: len(opening) - len(user_start)]
    bos = str(tokenizer.bos_token or "")
    # SmolLM2's begins every turn.
    bos = bos if bos and opening.startswith(bos) and not user_start.startswith(bos) else ""
    pieces: dict[str, Any] = {
        "bos": bos,
        "user_start": user_start,
        "user_end": user_end,
        "assistant_start": assistant_start,
        "answer_start": answer_start,
        "assistant_end": assistant_end,
        **_images(own, tokenizer, left_out),
    }
    pieces |= _system_turn(text, opening[len(bos) :], pieces, left_out)
    pieces["trim"] = tuple(
        role
        for role, messages in (
            ("system", [_system(f" \n{SYSTEM}\n "), question]),
            ("user", [_user(f" \n{ASKED}\n "), answer]),
            ("assistant", [question, _assistant(f" \n{SAID}\n "), _user(AGAIN)]),
        )
        if _trims(own, tokenizer, role, messages)
    )
    return ChatTemplate(**pieces), tuple(left_out)


def _around(rendered: str, *words: str) -> list[str]:
    """What stands before, between and behind these words.

    :raises ValueError: one of them is not there.
    """
    out, rest = [], rendered
    for word in words:
        before, found, rest = rest.partition(word)
        if not found:
            raise ValueError(f"the text {word!r} of a probe is not in {rendered!r}")
        out.append(before)
    return [*out, rest]


def _system_turn(
    text: Callable[..., str], default: str, turns: Mapping[str, Any], left_out: list[str]
) -> dict[str, Any]:
    """The pieces of a system turn.

    :param text: renders messages.
    :param default: what opens a conversation without a system message, but for `bos`.
    :param turns: the pieces of the others; :param left_out: what they leave out is added.
    """
    bos, user_start, assistant_end = (turns[n] for n in ("bos", "user_start", "assistant_end"))
    question, answer = _user(ASKED), _assistant(SAID)
    pieces: dict[str, Any] = {}
    try:
        before, after, _ = _around(text([_system(SYSTEM), question]), SYSTEM, ASKED)
        if not (before.startswith(bos) and after.endswith(user_start)):
            raise ValueError("a system message does not stand in a turn of its own")
        start, end = before[len(bos) :], after[: len(after) - len(user_start)]
        pieces |= {"system_start": start, "system_end": end}
        with contextlib.suppress(Exception):  # many templates refuse it
            later = text([question, answer, _system(SYSTEM), _user(AGAIN)])
            if _around(later, SAID, SYSTEM)[1] != assistant_end + start:
                left_out.append("another opening of later system messages")
        if default.startswith(start) and default[len(start) :].endswith(end):
            words = default[len(start) : len(default) - len(end)]
            pieces |= {"system": words, "system_always": bool(default) and not words}
        elif default:
            left_out.append(f"what opens a conversation without a system message ({default!r})")
    except Exception:  # jinja's own, or what a template raises
        left_out.append(NO_SYSTEM)
        pieces["system"] = default
    return pieces


def render(own: str, tokenizer: Any, messages: Messages, **options: Any) -> str:
    """What a tokenizer's own template makes of a conversation, as transformers renders it."""
    rendered: str = tokenizer.apply_chat_template(
        messages, chat_template=ALWAYS + own, tokenize=False, **options
    )
    return rendered


def _images(own: str, tokenizer: Any, left_out: list[str]) -> dict[str, str]:
    """What stands around an image, where the template knows images."""
    content = [{"type": "text", "text": ASKED}, {"type": "image"}, {"type": "text", "text": AGAIN}]
    try:
        rendered = render(own, tokenizer, [{"role": "user", "content": content}])
        _, _, rest = rendered.partition(ASKED)
        block, found, _ = rest.partition(AGAIN)
    except Exception:  # a template of text alone
        return {}
    if "image" not in own or not found or "'type'" in block or not block:
        return {}
    added = sorted((t.content for t in tokenizer.added_tokens_decoder.values()), key=len)
    tokens = re.findall("|".join(map(re.escape, reversed(added))) or "(?!)", block)
    if "".join(tokens) == block and len(tokens) in (1, 3):
        # The token in the middle stands for the image itself, which takes no place in the text.
        middle = len(tokens) // 2
        return {"image_start": "".join(tokens[:middle]), "image_end": "".join(tokens[middle + 1 :])}
    left_out.append(f"what stands around an image ({block!r})")
    return {}


def _trims(own: str, tokenizer: Any, role: str, messages: Messages) -> bool:
    word = {"system": SYSTEM, "user": ASKED, "assistant": SAID}[role]
    try:
        return f" \n{word}\n " not in render(own, tokenizer, messages)
    except Exception:  # a role that the template refuses
        return False


def _common_end(a: str, b: str) -> str:
    length = 0
    while length < min(len(a), len(b)) and a[-1 - length] == b[-1 - length]:
        length += 1
    return a[len(a) - length :]


def _system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def _assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


# ----------------------------------------------------------------------------------- comparing

QUESTION, ANSWER = _user("What is in the picture?"), _assistant("A red circle.")
# (name, messages, whether the assistant's turn is opened at the end).
PROBES: tuple[tuple[str, Messages, bool], ...] = (
    ("one turn", [QUESTION, ANSWER], False),
    ("two turns", [QUESTION, ANSWER, _user("And behind it?"), _assistant("Nothing.")], False),
    ("three turns", [QUESTION, ANSWER, _user("Why?"), _assistant("So."), QUESTION, ANSWER], False),
    ("an open last turn", [QUESTION, ANSWER, _user("And behind it?")], True),
    ("a question alone", [QUESTION], True),
    ("a system message", [_system("Be brief."), QUESTION, ANSWER], False),
    ("a system message and two turns", [_system("Be brief."), QUESTION, ANSWER, QUESTION], True),
    ("white space around a question", [_user(" \n What? \n "), ANSWER], False),
    ("white space around a system message", [_system("\n Be brief. \n"), QUESTION, ANSWER], False),
    ("white space behind an answer", [QUESTION, _assistant("Red. \n"), QUESTION], True),
    ("an empty answer", [QUESTION, _assistant(""), QUESTION, ANSWER], False),
    ("an empty question", [_user(""), ANSWER], False),
    ("line breaks, digits and letters", [_user("1 + 1?\n\n東 Öl 😀"), _assistant("2\n\n3")], False),
)


def first_difference(own: str, tokenizer: Any, processor: CasaProcessor) -> str | None:
    """Where the processor's ids are not those that the tokenizer gives its own rendered text.

    :return: the first probe that differs, in words; None where all are equal. A conversation that
        the own template refuses is no difference.
    """
    for name, messages, prompt in PROBES:
        try:
            text = render(own, tokenizer, messages, add_generation_prompt=prompt)
        except Exception:  # templates may refuse system messages, or anything else
            continue
        expected: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        found = processor.encode(messages, generation_prompt=prompt).ids
        if found != expected:
            at = next(
                (i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b),
                min(len(found), len(expected)),
            )
            return (
                f"{name}, token {at}: {_shown(tokenizer, expected, at)} in the tokenizer's own, "
                f"{_shown(tokenizer, found, at)} here"
            )
    return None


def _shown(tokenizer: Any, ids: Sequence[int], at: int) -> str:
    if at >= len(ids):
        return "the end"
    return repr("".join(tokenizer.convert_ids_to_tokens(list(ids[at : at + 4]))))


def verdict(resolved: Resolved, tokenizer: Any, processor: CasaProcessor) -> str:
    """One line for the start of a run: whose template is in force."""
    template = resolved.template
    if resolved.own is None:
        return (
            "template: the tokenizer brings none; turns are "
            f"{template.user_start + '...' + template.user_end!r} and "
            f"{template.assistant_start + '...' + template.assistant_end!r}"
        )
    difference = first_difference(resolved.own, tokenizer, processor)
    line = "template: the tokenizer's own"
    if difference is not None:
        line = f"template: not the tokenizer's own: {difference}"
    if resolved.left_out:
        line += f"; left out: {', '.join(resolved.left_out)}"
    return line
