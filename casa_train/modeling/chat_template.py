"""The chat template: its literal pieces, the same as jinja, and rendered text cut again.

Training encodes conversations piece by piece (`CasaProcessor.encode`). Jinja renders the same
pieces as one text, for whoever wants to see or edit a prompt; there `<image>` and `<video>` stand
for slots, and where a user wrote these words a backslash sets them apart: `<\\image>`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass

SLOTS = ("image", "video")


@dataclass(frozen=True)
class ChatTemplate:
    """The literal text around turns and images; each piece may hold special tokens.

    :param system: the text of the system turn of a conversation that brings none of its own.
    :param system_start: before a system text, default or given; `system_end` after it.
    :param image_start: before every image; `image_end` after it. The insertion point lies between.
    """

    bos: str = ""
    system: str = ""
    system_start: str = ""
    system_end: str = ""
    user_start: str = ""
    user_end: str = ""
    assistant_start: str = ""
    assistant_end: str = ""
    image_start: str = ""
    image_end: str = ""


# Filled with the pieces of a template as jinja strings. `quote` marks slot words of users; texts
# that touch are joined before, so that two of them never make up a slot word together.
JINJA = r"""
{%- macro quote(text, word) -%}
    {%- for piece in text.split(word) -%}
        {{- piece -}}
        {%- if not loop.last -%}
            {%- if piece.rstrip('\\').endswith('<') -%}{{- '\\' -}}{%- endif -%}
            {{- word -}}
        {%- endif -%}
    {%- endfor -%}
{%- endmacro -%}
{%- macro words(text) -%}{{- quote(quote(text, 'image>'), 'video>') -}}{%- endmacro -%}
{%- macro body(message) -%}
    {%- set run = namespace(text='') -%}
    {%- set parts = message.content -%}
    {%- if parts is string -%}{%- set parts = [{'type': 'text', 'text': parts}] -%}{%- endif -%}
    {%- for part in parts -%}
        {%- if part.type == 'text' -%}
            {%- set run.text = run.text ~ part.text -%}
        {%- elif message.role != 'user' -%}
            {{- raise_exception('images and videos belong into messages of the user') -}}
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
{{- @bos@ -}}
{%- if @system@ and (not messages or messages[0].role != 'system') -%}
    {{- @system_start@ ~ @system@ ~ @system_end@ -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message.role == 'system' -%}
        {{- @system_start@ ~ body(message) ~ @system_end@ -}}
    {%- elif message.role == 'user' -%}
        {{- @user_start@ ~ body(message) ~ @user_end@ -}}
    {%- elif message.role == 'assistant' -%}
        {{- @assistant_start@ ~ body(message) ~ @assistant_end@ -}}
    {%- else -%}
        {{- raise_exception('unknown role: ' ~ message.role) -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and messages and messages[-1].role != 'assistant' -%}
    {{- @assistant_start@ -}}
{%- endif -%}
"""


def as_jinja(template: ChatTemplate) -> str:
    """The template as transformers' `apply_chat_template` takes it."""
    pieces = asdict(template)
    return re.sub(
        "@([a-z_]+)@", lambda found: json.dumps(pieces[found[1]], ensure_ascii=False), JINJA
    ).strip()


def cut(template: ChatTemplate, text: str) -> Iterator[tuple[str, str]]:
    """Cuts rendered text into what is tokenized piece by piece.

    A user's text that holds a whole piece of the template is cut there, too.

    :return: ("text", a literal piece or a stretch between pieces), ("image", "") and ("video", "").
    """
    pieces = {p for name, p in asdict(template).items() if name != "system" and p}
    literals = "|".join(re.escape(p) for p in sorted(pieces, key=len, reverse=True))
    pattern = f"<(?P<slot>{'|'.join(SLOTS)})>" + (f"|{literals}" if literals else "")
    end = 0
    for found in re.finditer(pattern, text):
        if found.start() > end:
            yield "text", _unquote(text[end : found.start()])
        end = found.end()
        yield (found["slot"], "") if found["slot"] else ("text", found[0])
    if end < len(text):
        yield "text", _unquote(text[end:])


def _unquote(text: str) -> str:
    return re.sub(rf"<\\(\\*(?:{'|'.join(SLOTS)})>)", r"<\1", text)
