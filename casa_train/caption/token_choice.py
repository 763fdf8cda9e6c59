"""The next token of one stream: penalty, bias, block, then the most likely one or a drawn one.

What is remembered for it lives as long as the stream: every frame is a call of its own, and the
text before it lies in a cache that no logits processor sees.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection

import torch
from torch import Tensor

from casa_train.caption.options import CaptionOptions

FORGOTTEN = 1e-3  # a count that no longer moves a logit


class TokenChoice:
    """Chooses and remembers the tokens of one stream.

    :param exempt: tokens that end frames: neither penalised nor blocked, since a silent video says
        nothing else.
    :param stop: those of them that begin an end, whose logits `stop_bias` moves.
    """

    def __init__(
        self, options: CaptionOptions, exempt: Collection[int], stop: Collection[int]
    ) -> None:
        self.options = options
        self.exempt = frozenset(exempt)
        self._stop = torch.tensor(sorted(stop), dtype=torch.long)
        self._counts: dict[int, float] = {}
        self._said: deque[int] = deque(maxlen=options.ngram_window)
        self._generator = torch.Generator().manual_seed(options.seed)

    def choose(self, logits: Tensor) -> int:
        """:param logits: (vocabulary,) of the next token; they stay as they are."""
        options = self.options
        if options.greedy:
            return int(logits.argmax())
        scores = logits.float().cpu().clone()
        if options.repetition_penalty != 1 and self._counts:
            ids = torch.tensor(list(self._counts), dtype=torch.long)
            counts = torch.tensor(list(self._counts.values())).clamp(max=options.penalty_most)
            factor = options.repetition_penalty**counts
            scores[ids] = torch.where(scores[ids] < 0, scores[ids] * factor, scores[ids] / factor)
        if options.stop_bias != 1:
            stop = scores[self._stop]
            bias = options.stop_bias
            scores[self._stop] = torch.where(stop < 0, stop / bias, stop * bias)
        if blocked := self._blocked():
            scores[list(blocked)] = -torch.inf
        if options.temperature == 0:
            return int(scores.argmax())
        scores /= options.temperature
        if 0 < options.top_k < len(scores):
            scores[scores < scores.topk(options.top_k).values[-1]] = -torch.inf
        return int(torch.multinomial(scores.softmax(0), 1, generator=self._generator))

    def said(self, token: int) -> None:
        """Remembers a token that was chosen."""
        options = self.options
        if options.repetition_penalty != 1:
            decayed = {i: n * options.penalty_decay for i, n in self._counts.items()}
            self._counts = {i: n for i, n in decayed.items() if n > FORGOTTEN}
            if token not in self.exempt:
                self._counts[token] = self._counts.get(token, 0.0) + 1
        if options.ngram:
            self._said.append(token)

    def _blocked(self) -> set[int]:
        """Tokens that would end an n-gram that was said within the window."""
        n, said = self.options.ngram, list(self._said)
        if not n or len(said) < n:
            return set()
        head = said[len(said) - n + 1 :]
        ends = range(n - 1, len(said))
        return {said[i] for i in ends if said[i - n + 1 : i] == head} - self.exempt
