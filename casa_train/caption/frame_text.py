"""The words of one frame while their tokens arrive."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

UNFINISHED = "\ufffd"  # what a tokenizer shows of a character whose last bytes are still to come


class FrameText:
    """Text of a frame, without the end of the frame.

    :param end: the text that ends a frame; empty: a token does.
    :param begin: words that were put in its mouth; they belong to the text.
    :param heard: is given each new piece of the text, once nothing of it can belong to the end.
    """

    def __init__(
        self,
        processor: Any,
        end: str,
        begin: str = "",
        heard: Callable[[str], None] | None = None,
    ) -> None:
        self._processor, self._heard = processor, heard
        self._end, self._begin = end, begin
        # A decoder of SentencePiece drops the space that a text begins with: behind these it stays.
        self._before = processor.tokenizer.encode(begin, add_special_tokens=False) if begin else []
        self._skipped = len(self._decode(self._before))
        self.ids: list[int] = []
        self.text = begin
        self._told = 0

    def add(self, token: int) -> bool:
        """Takes a token; returns whether the text that ends a frame is complete with it."""
        self.ids.append(token)
        said = self._decode([*self._before, *self.ids])[self._skipped :]
        mark = self._end.strip()
        ended = bool(mark) and _ends(said, self._end)
        self.text = self._begin + (said[: len(said) - len(mark)].rstrip() if ended else said)
        self._tell(len(self.text) if ended else self._settled(mark))
        return ended

    def finish(self) -> str:
        """Nothing comes any more: tells the rest; returns the whole text, stripped.

        A character that was cut is left out.
        """
        self.text = self.text.rstrip(UNFINISHED).rstrip()
        self._tell(len(self.text))
        return self.text.strip()

    def _decode(self, ids: list[int]) -> str:
        # The library's clean-up would draw " ..." to the word before it.
        text: str = self._processor.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def _settled(self, mark: str) -> int:
        """Characters that will stay whatever comes."""
        text = self.text.rstrip(UNFINISHED)
        held = next((n for n in range(len(mark) - 1, 0, -1) if text.endswith(mark[:n])), 0)
        return len(text[: len(text) - held].rstrip())

    def _tell(self, upto: int) -> None:
        if self._heard is not None and upto > self._told:
            self._heard(self.text[self._told : upto])
            self._told = upto


def _ends(text: str, end: str) -> bool:
    """Whether a frame's text ends: with the words of its end, apart from what was said."""
    mark = end.strip()
    if not text.endswith(mark):
        return False
    before = text[: len(text) - len(mark)]
    return not before or not end[0].isspace() or before[-1].isspace()
