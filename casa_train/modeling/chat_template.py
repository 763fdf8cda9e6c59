"""The chat template: its literal pieces, the same as jinja, and rendered text read back.

`CasaProcessor.encode` goes straight from messages to ids. Jinja renders the same pieces as one
text, for whoever wants to see or edit a prompt. There `<image>` and `<video>` stand for slots, and
special tokens act; where a user wrote one of these words it is text, and a backslash sets it apart:
`<\\image>`, `<\\|im_end|>`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

SLOTS = ("image", "video")
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class ChatTemplate:
    """The literal text around turns and images; each piece may hold special tokens.

    :param system: the text of the system turn of a conversation that brings none of its own.
    :param system_start: before a system text, default or given; `system_end` after it.
    :param answer_start: what an answer begins with that is generated, and learned, with it: the
        space of templates whose prompt ends with "Assistant:".
    :param system_always: such a conversation has a system turn even where `system` is empty.
    :param image_start: before every image; `image_end` after it. The insertion point lies between.
    :param trim: roles whose texts lose their outer white space.
    """

    bos: str = ""
    system: str = ""
    system_start: str = ""
    system_end: str = ""
    user_start: str = ""
    user_end: str = ""
    assistant_start: str = ""
    answer_start: str = ""
    assistant_end: str = ""
    image_start: str = ""
    image_end: str = ""
    system_always: bool = False
    trim: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "trim", tuple(self.trim))  # a list, where it was read from a file
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "trim":
                fits, expected = set(value) <= set(ROLES), f"names out of {list(ROLES)}"
            elif field.name == "system_always":
                fits, expected = isinstance(value, bool), "true or false"
            else:
                fits, expected = isinstance(value, str), "text"
            if not fits:
                raise ValueError(
                    f"chat template field {field.name!r} is {value!r}; expected {expected}"
                )

    @property
    def pieces(self) -> dict[str, str]:
        """The literals by name; the default system text is one of them."""
        return {name: value for name, value in asdict(self).items() if isinstance(value, str)}

    def given(self) -> dict[str, Any]:
        """The fields that are not empty."""
        return {name: value for name, value in asdict(self).items() if value}

    @property
    def opens_with_system(self) -> bool:
        """Whether a conversation without a system message opens with a system turn."""
        return bool(self.system) or self.system_always


# Filled with the pieces of a template as jinja values. `words` marks slot words and special tokens
# that users typed; texts that touch are joined before, so that two of them never make up such a
# word together.
JINJA = r"""
{%- macro quote(text, first, rest) -%}
    {%- for piece in text.split(rest) -%}
        {{- piece -}}
        {%- if not loop.last -%}
            {%- if piece.rstrip('\\').endswith(first) -%}{{- '\\' -}}{%- endif -%}
            {{- rest -}}
        {%- endif -%}
    {%- endfor -%}
{%- endmacro -%}
{%- macro words(text) -%}
    {%- set marked = namespace(text=text) -%}
    {%- for first, rest in @words@ -%}
        {%- if rest in marked.text -%}
            {%- set marked.text = quote(marked.text, first, rest) -%}
        {%- endif -%}
    {%- endfor -%}
    {{- marked.text -}}
{%- endmacro -%}
{%- macro parts(message) -%}
    {%- set run = namespace(text='') -%}
    {%- set content = message.content -%}
    {%- if content is string -%}
        {%- set content = [{'type': 'text', 'text': content}] -%}
    {%- endif -%}
    {%- for part in content -%}
        {%- if part.type == 'text' -%}
            {%- set run.text = run.text ~ part.text -%}
        {%- elif message.role == 'system' -%}
            {{- raise_exception('images and videos belong into messages of user and assistant') -}}
        {%- elif part.type in ('image', 'image_url') -%}
            {{- words(run.text) ~ @image_start@ ~ '<image>' ~ @image_end@ -}}
            {%- set run.text = '' -%}
        {%- elif part.type == 'video' -%}
            {{- words(run.text) ~ '<video>' -}}
            {%- set run.text = '' -%}
        {%- else -%}
            {{- raise_exception('unknown type of content: ' ~ part.type) -}}
        {%- endif -%}
    {%- endfor -%}
    {{- words(run.text) -}}
{%- endmacro -%}
{%- macro body(message) -%}
    {%- if message.role in @trim@ -%}
        {{- parts(message) | trim -}}
    {%- else -%}
        {{- parts(message) -}}
    {%- endif -%}
{%- endmacro -%}
{{- @bos@ -}}
{%- if @opens_with_system@ and (not messages or messages[0].role != 'system') -%}
    {{- @system_start@ ~ @system@ ~ @system_end@ -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message.role == 'system' -%}
        {{- @system_start@ ~ body(message) ~ @system_end@ -}}
    {%- elif message.role == 'user' -%}
        {{- @user_start@ ~ body(message) ~ @user_end@ -}}
    {%- elif message.role == 'assistant' -%}
        {{- @assistant_start@ ~ @answer_start@ ~ body(message) ~ @assistant_end@ -}}
    {%- else -%}
        {{- raise_exception('unknown role: ' ~ message.role) -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and messages -%}
    {{- @assistant_start@ -}}
{%- endif -%}
"""


def as_jinja(template: ChatTemplate, special: Iterable[str] = ()) -> str:
    """The template as transformers' `apply_chat_template` takes it.

    :param special: the tokens that a user's text must not bring about.
    """
    words = [[word[0], word[1:]] for word in quotable(special)]
    return json.dumps(words, ensure_ascii=False).join(_around_words(template))


def is_jinja_of(template: ChatTemplate, text: str) -> bool:
    """Whether a text is the template as jinja, whichever tokens were special when it was made."""
    before, after = _around_words(template)
    if not (text.startswith(before) and text.endswith(after)):
        return False
    try:
        words = json.loads(text[len(before) : len(text) - len(after)])
    except ValueError:
        return False
    return isinstance(words, list)


def _around_words(template: ChatTemplate) -> list[str]:
    """The jinja before and after the list of words."""
    values = {**asdict(template), "opens_with_system": template.opens_with_system}
    return [
        re.sub("@([a-z_]+)@", lambda found: json.dumps(values[found[1]], ensure_ascii=False), half)
        for half in JINJA.strip().split("@words@")
    ]


def quotable(special: Iterable[str]) -> list[str]:
    """What a backslash sets apart in rendered text: slots and special tokens.

    A word that begins with another one is quoted with it.
    """
    words = sorted({*(f"<{slot}>" for slot in SLOTS), *(w for w in special if len(w) > 1)})
    return [w for w in words if not any(w != other and w.startswith(other) for other in words)]


class RenderedText:
    """Reads text as the template renders it.

    :param special: as for `as_jinja`.
    """

    def __init__(self, template: ChatTemplate, special: Sequence[str]) -> None:
        tokens = "|".join(re.escape(t) for t in sorted(special, key=len, reverse=True))
        start, end = re.escape(template.image_start), re.escape(template.image_end)
        image = f"{start}<image>{end}|<image>" if start or end else "<image>"
        self._marks = re.compile(f"(?P<image>{image})|(?P<video><video>)|{tokens or '(?!)'}")
        rests = "|".join(re.escape(word[1:]) for word in quotable(special))
        firsts = "".join(re.escape(c) for c in sorted({word[0] for word in quotable(special)}))
        self._quoted = re.compile(rf"(?<=[{firsts}])\\(?=\\*(?:{rests}))")
        # An answer begins where its opening ends, another turn where its own begins. Literals of
        # plain text count only behind the end of a turn: elsewhere somebody wrote them.
        ends = (template.bos, template.system_end, template.user_end, template.assistant_end)
        behind = "|".join(["^", *(rf"(?<={re.escape(end)})" for end in ends if end)])

        def opening(literal: str) -> re.Pattern[str]:
            special = self._marks.match(literal) is not None
            return re.compile(
                re.escape(literal) if special else f"(?:{behind}){re.escape(literal)}"
            )

        if template.assistant_start:
            self._answers = [opening(template.assistant_start)]
        else:
            self._answers = [re.compile(re.escape(template.user_end))] if template.user_end else []
        others = {template.user_start, template.system_start} - {"", template.assistant_start}
        self._turns = [
            # What also stands in front of an image is no turn there.
            re.compile(opening(o).pattern + ("(?!<image>)" if o == template.image_start else ""))
            for o in sorted(others)
        ]

    def read(self, text: str) -> Iterator[tuple[str, str]]:
        """Cuts rendered text.

        :return: ("text", words), ("special", token), ("answer", "") where an answer begins,
            ("turn", "") where another turn does, ("image", "" or what stands around it too) and
            ("video", "").
        """
        cuts = [(m.end(), "answer") for answer in self._answers for m in answer.finditer(text)]
        cuts += [(m.start(), "turn") for turn in self._turns for m in turn.finditer(text)]
        cuts.sort()
        at = 0
        for found in [*self._marks.finditer(text), None]:
            stop = len(text) if found is None else found.start()
            while cuts and cuts[0][0] <= stop:
                place, kind = cuts.pop(0)
                if place > at:
                    yield "text", self._unquote(text[at:place])
                yield kind, ""
                at = max(at, place)
            if stop > at:
                yield "text", self._unquote(text[at:stop])
            if found is not None:
                kind = found.lastgroup or "special"
                yield kind, found[0] if kind == "special" or found[0] != f"<{kind}>" else ""
                at = found.end()

    def _unquote(self, text: str) -> str:
        return self._quoted.sub("", text)
