"""Sample and Turn: the one record every source becomes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ImageSlot:
    """A place in a user turn where image `index` of the sample stands."""

    index: int


@dataclass(frozen=True)
class Turn:
    """One question and its answer; `user` interleaves text with image slots."""

    user: tuple[str | ImageSlot, ...]
    assistant: str


@dataclass(frozen=True)
class Sample:
    """A conversation about zero or more images, still encoded as the source stored them.

    :param key: unique within its dataset directory; it is also the tar member stem.
    :param source: the subset it came from; metrics and mixtures go by this name.
    :param images: original file bytes (JPEG, PNG or WebP).
    """

    key: str
    source: str
    turns: tuple[Turn, ...]
    images: tuple[bytes, ...]

    def messages(self, images: list[Any] | None = None) -> list[dict[str, Any]]:
        """The conversation as the processor's messages (casa.md section 8).

        :param images: what to put into the image slots, by index; None leaves every slot empty.
        """
        messages: list[dict[str, Any]] = []
        for turn in self.turns:
            content: list[dict[str, Any]] = []
            for part in turn.user:
                if isinstance(part, ImageSlot):
                    image = None if images is None else images[part.index]
                    content.append({"type": "image", "image": image})
                else:
                    content.append({"type": "text", "text": part})
            messages.append({"role": "user", "content": content})
            answer = [{"type": "text", "text": turn.assistant}]
            messages.append({"role": "assistant", "content": answer})
        return messages
