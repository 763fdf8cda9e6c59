"""The two budgets of a pack: text tokens and image tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from casa_train.config.data_schema import DataConfig

# The dummy sample of a pack without any window: one text token, one image token.
RESERVED = 1


@dataclass(frozen=True)
class Budget:
    """How many tokens of each kind there is room for.

    :param text: text tokens; :param images: image tokens.
    """

    text: int
    images: int

    @classmethod
    def of(cls, data: DataConfig) -> Budget:
        """The budget of a whole pack."""
        return cls(data.text_tokens, data.image_tokens)

    def for_samples(self) -> Budget:
        """What samples may fill of a whole pack's budget; the rest is kept for its dummy."""
        return Budget(self.text - RESERVED, self.images - RESERVED)

    def of_pack(self) -> Budget:
        """The whole budget of a pack whose samples may fill this one; undoes `for_samples`."""
        return Budget(self.text + RESERVED, self.images + RESERVED)

    def holds(self, text: Any, images: Any) -> Any:
        """Whether so many tokens fit; of arrays of lengths, which of them do."""
        return (text <= self.text) & (images <= self.images)

    def fills(self, text: Any, images: Any) -> tuple[Any, Any]:
        """The used share of each; of arrays of lengths, two arrays."""
        return text / self.text, images / self.images
