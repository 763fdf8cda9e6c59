"""Text and special tokens -> ids, as the tokenizer gives them for the whole text.

A conversation is a list of segments of text and special tokens. Its ids are those that the
tokenizer gives the segments joined as one text, with two exceptions: a segment begins at a token
boundary, so that what stands before it is read the same with and without it; and in text no special
token comes about, whatever a user typed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer

# Stands where the special tokens of the joined text were: an added token of our copy of the
# tokenizer alone. Noncharacters of Unicode, which no text is meant to hold.
BREAK = "\ufdd0\ufdd1\ufdd2"
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
SHAPE = re.compile(r"[<\[{|].*[>\]}|]")
MARK = re.compile(r"<\|[^|<>\s]+\|>|</?s>")
# Texts, mostly literals of the template, whose ids are kept: how many, of how many characters.
REMEMBERED, LONGEST_REMEMBERED = 4096, 256

Piece = str | int  # text, or the id of a special token


class TextIds:
    """Encodes text with a copy of a fast tokenizer in which special tokens are words like others.

    :param tokenizer: a fast tokenizer.
    :param literals: of the chat template; added tokens in them that look like tags are special,
        whatever the tokenizer calls them.
    :raises ValueError: a tokenizer without the library's backend.
    """

    def __init__(self, tokenizer: Any, literals: Iterable[str]) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ValueError(
                f"the tokenizer is a {type(tokenizer).__name__}; expected a fast tokenizer: a "
                "directory with tokenizer.json"
            )
        added: dict[int, Any] = tokenizer.added_tokens_decoder
        by_length = sorted({token.content for token in added.values()}, key=len, reverse=True)
        anything = re.compile("|".join(map(re.escape, by_length)) or "(?!)")
        literals = list(literals)
        used = {token for literal in literals for token in anything.findall(literal)}
        used = {token for token in used if SHAPE.fullmatch(token)}  # a line break may be added, too
        named = set(tokenizer.all_special_ids)
        special = {
            token.content: (number, token)
            for number, token in added.items()
            if token.special or number in named or token.content in used
        }
        self._added = {token.content for token in added.values()}
        self._backend = _text_backend(backend, [token for _, token in special.values()])
        self._break = self._backend.token_to_id(BREAK)
        self._memory: dict[str, list[int]] = {}
        # Tokens that eat the white space beside them.
        self._eats_left = {n for n, token in special.values() if token.lstrip}
        self._eats_right = {n for n, token in special.values() if token.rstrip}
        self.special: dict[str, int] = {content: n for content, (n, _) in special.items()}
        # A unigram model reads "<s>" in text as its token, and "<0x41>" as the byte. Such words of
        # its own vocabulary act in the template alone, and never come about by being typed.
        vocabulary = backend.get_vocab(with_added_tokens=False)
        marks = {mark for literal in literals for mark in MARK.findall(literal)}
        self._words: dict[int, str] = {
            i: word
            for word, i in vocabulary.items()
            if (word in self.special or word in marks or BYTE.fullmatch(word))
            and i in self._backend.encode(BREAK + word, add_special_tokens=False).ids
        }
        self.special |= {word: i for i, word in self._words.items() if word in marks}
        self._words_cut = re.compile("|".join(map(re.escape, self._words.values())) or "(?!)")
        longest_first = sorted(self.special, key=len, reverse=True)
        self._cut = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        # SentencePiece's and byte-level vocabularies write a space like this.
        first = self._backend.id_to_token(self._ids("a")[0]) or ""
        self._adds_space = first.startswith(("▁", "Ġ"))

    def __deepcopy__(self, memo: Any) -> TextIds:
        return self  # never changes, and copying a vocabulary takes a second

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # A pickled tokenizer forgets this one setting; without it typed special tokens would act.
        self._backend.encode_special_tokens = True

    def pieces(self, literal: str) -> list[Piece]:
        """A literal of the template as text and ids of special tokens."""
        out: list[Piece] = []
        end = 0
        for found in self._cut.finditer(literal):
            out += [literal[end : found.start()], self.special[found[0]]]
            end = found.end()
        return [piece for piece in [*out, literal[end:]] if piece != ""]

    def holds_special(self, text: str) -> bool:
        """Whether a text spells a special token."""
        return self._cut.search(text) is not None

    def encode(self, segments: Sequence[Sequence[Piece]], start: bool = True) -> list[list[int]]:
        """The ids of each segment.

        :param start: whether the first segment begins the whole text.
        """
        out: list[list[list[int]]] = [[] for _ in segments]
        runs: list[list[tuple[int, int, str]]] = [[]]  # stretches between special tokens
        eaten = False
        for number, segment in enumerate(segments):
            for piece in segment:
                if isinstance(piece, str):
                    if eaten and not runs[-1]:
                        piece = piece.lstrip()
                    if piece:
                        runs[-1].append((number, len(out[number]), piece))
                        out[number].append([])
                    continue
                if piece in self._eats_left:
                    while runs[-1] and not runs[-1][-1][2].strip():
                        runs[-1].pop()
                    if runs[-1]:
                        at, place, text = runs[-1].pop()
                        runs[-1].append((at, place, text.rstrip()))
                out[number].append([piece])
                eaten = piece in self._eats_right
                runs.append([])
        first = start and bool(runs[0])
        runs = [run for run in runs if run]
        joined = ["".join(text for _, _, text in run) for run in runs]
        for i, (run, whole) in enumerate(zip(runs, self._all_ids(joined, first), strict=True)):
            for (number, place, _), ids in zip(
                run, self._segmented(run, whole, first and i == 0), strict=True
            ):
                out[number][place] = ids
        return [[i for ids in parts for i in ids] for parts in out]

    def _segmented(
        self, run: Sequence[tuple[int, int, str]], whole: list[int], first: bool
    ) -> list[list[int]]:
        """The ids of each text of a run, given those of all of it.

        Texts of one segment are joined first; only between segments is there a boundary.
        """
        texts: list[str] = []
        members: list[int] = []  # how many texts of the run each of them holds
        for i, (number, _, text) in enumerate(run):
            if i and run[i - 1][0] == number:
                texts[-1] += text
                members[-1] += 1
            else:
                texts.append(text)
                members.append(1)
        ids = [whole if len(texts) == 1 else self._short_ids(texts[0], first)]
        for i in range(1, len(texts)):
            starts = first and i == 1
            before = self._short_ids(texts[i - 1], starts)
            both = whole if len(texts) == 2 else self._ids(texts[i - 1] + texts[i], starts)
            if both[: len(before)] == before:
                ids.append(both[len(before) :])
            else:
                ids.append(self._behind_something(texts[i]))
        spread: list[list[int]] = []
        for given, count in zip(ids, members, strict=True):
            spread += [given, *([] for _ in range(count - 1))]
        return spread

    def _behind_something(self, text: str) -> list[int]:
        """Ids of a text that begins at a token boundary, without the space that some tokenizers put
        in front of what they take for the start of a text.
        """
        if self._adds_space:
            # Behind an added token there may be such a space again.
            for lead in (lead for lead in ("\n", ".", "a", "1") if lead not in self._added):
                ids, before = self._ids(lead + text), self._ids(lead)
                if ids[: len(before)] == before:
                    return ids[len(before) :]
        return self._ids(text)

    def _all_ids(self, texts: list[str], first: bool) -> list[list[int]]:
        """Ids of each text, all encoded at once; :param first: the first one starts the whole."""
        if not texts:
            return []
        if any(BREAK in text for text in texts):
            return [self._ids(text, first and i == 0) for i, text in enumerate(texts)]
        ids = self._guarded(("" if first else BREAK) + BREAK.join(texts))
        out: list[list[int]] = [[]] if first else []
        for i in ids:
            if i == self._break:
                out.append([])
            else:
                out[-1].append(i)
        return out

    def _short_ids(self, text: str, first: bool) -> list[int]:
        if first or len(text) > LONGEST_REMEMBERED:
            return self._ids(text, first)
        if text not in self._memory:
            if len(self._memory) >= REMEMBERED:
                self._memory.clear()
            self._memory[text] = self._ids(text)
        return self._memory[text]

    def _ids(self, text: str, first: bool = False) -> list[int]:
        # Whoever writes our break gets it cut in two.
        apart = text.replace(BREAK, BREAK[0] + BREAK + BREAK[1:])
        ids = self._guarded(apart if first else BREAK + apart)
        return [i for i in ids if i != self._break]

    def _guarded(self, text: str) -> list[int]:
        encoded = self._backend.encode(text, add_special_tokens=False)
        ids: list[int] = encoded.ids
        if not self._words or self._words_cut.search(text) is None:
            return ids
        out: list[int] = []
        for i, (start, stop) in zip(ids, encoded.offsets, strict=True):
            word = self._words.get(i)
            if word is not None and text[start:stop].strip() == word:
                out += self._spelled(word)
            else:
                out.append(i)
        return out

    def _spelled(self, word: str) -> list[int]:
        """A word of the vocabulary by smaller ones."""
        for parts in ((word[:1], word[1:]), tuple(word)):
            ids = [token.id for part in parts for token in self._backend.model.tokenize(part)]
            if not any(i in self._words for i in ids):
                break
        return ids


def _text_backend(backend: Tokenizer, special: Sequence[Any]) -> Tokenizer:
    """A copy that takes special tokens for text, and knows BREAK."""
    copy = Tokenizer.from_str(backend.to_str())
    copy.no_truncation()
    copy.no_padding()
    flags = ("single_word", "lstrip", "rstrip", "normalized")
    copy.add_special_tokens(
        [AddedToken(t.content, **{f: getattr(t, f) for f in flags}, special=True) for t in special]
    )
    copy.add_tokens([AddedToken(BREAK, normalized=False)])
    copy.encode_special_tokens = True
    return copy
