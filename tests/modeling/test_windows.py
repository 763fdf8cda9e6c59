"""Windows, positions and interleaving against a walk through each sample, token by token."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given

from casa_train.modeling.windows import (
    Chunk,
    Window,
    has_pair,
    image_positions,
    image_spans,
    interleave,
    split_windows,
    text_positions,
)
from tests.helpers.reference import Token, sample_tokens
from tests.helpers.tiny import HARD_PACK, PROPERTY, Layout, layouts


def chunks_of(pack: list[Layout]) -> list[Chunk]:
    """The chunks of a pack of whole samples."""
    return [layout.chunk() for layout in pack]


def tokens_of(layout: Layout) -> list[Token]:
    """The tokens of a sample, by the independent reference."""
    return sample_tokens(
        layout.text, layout.points, layout.image_tokens, layout.rows, layout.follows
    )


def rows_of(windows: list[Window], kind: str) -> list[int]:
    """All packed rows of one kind that the windows name, in order."""
    return [row for window in windows for row in range(*getattr(window, kind))]


@PROPERTY
@given(layouts())
@example(HARD_PACK)
def test_every_token_lies_in_exactly_one_window(pack: list[Layout]) -> None:
    windows = split_windows(chunks_of(pack))
    assert rows_of(windows, "text") == list(range(sum(layout.text for layout in pack)))
    assert rows_of(windows, "image") == list(range(sum(sum(x.image_tokens) for x in pack)))


@PROPERTY
@given(layouts())
@example(HARD_PACK)
def test_windows_are_those_of_the_definition(pack: list[Layout]) -> None:
    """Two tokens share a window exactly if the definition puts them behind the same images."""
    found = {}
    for index, window in enumerate(split_windows(chunks_of(pack))):
        assert window.continues == (window.image[0] == window.image[1])
        for kind in ("text", "image"):
            for row in range(*getattr(window, kind)):
                found[kind, row] = (index, window.sample, window.continues, window.follows)

    texts = images = 0
    expected = []
    for sample, layout in enumerate(pack):
        for token in tokens_of(layout):
            start = texts if token.kind == "text" else images
            index, found_sample, continues, follows = found[token.kind, start + token.row]
            assert found_sample == sample
            # A whole sample continues nothing: leading text is in no window.
            assert continues == (token.window is None)
            assert follows == (token.scope != token.window)
            expected.append((index, (sample, token.window)))
        texts, images = texts + layout.text, images + sum(layout.image_tokens)
    # One to one: an index never stands for two windows, and no window has two indices.
    assert len(set(expected)) == len({i for i, _ in expected}) == len({w for _, w in expected})


def test_windows_of_a_hand_written_sample() -> None:
    """Two leading text tokens, two consecutive images, then three and no text between images."""
    windows = split_windows([Chunk(3), Chunk(5, (2, 2, 5), (4, 1, 6))])
    assert windows == [
        Window(0, (0, 3), (0, 0), continues=True),
        Window(1, (3, 5), (0, 0), continues=True),
        Window(1, (5, 8), (0, 5)),
        Window(1, (8, 8), (5, 11)),
    ]


@PROPERTY
@given(layouts())
@example(HARD_PACK)
def test_has_pair_says_whether_an_image_has_text(pack: list[Layout]) -> None:
    read = [token.window for x in pack for token in tokens_of(x) if token.kind == "text"]
    assert has_pair(chunks_of(pack)) == any(window is not None for window in read)


@PROPERTY
@given(layouts())
@example(HARD_PACK)
def test_positions_are_those_of_the_definition(pack: list[Layout]) -> None:
    """Frozen counts text tokens before a token; advance counts text and image tokens.

    With multimodal RoPE, image tokens stand in a grid, and advance counts its longer side.
    """
    chunks = chunks_of(pack)
    tokens = [token for layout in pack for token in tokens_of(layout)]
    text = [token for token in tokens if token.kind == "text"]
    images = [token for token in tokens if token.kind == "image"]
    assert text_positions(chunks).tolist() == [token.text_before for token in text]
    assert text_positions(chunks, advance=True).tolist() == [token.place for token in text]
    assert image_positions(chunks).tolist() == [token.text_before for token in images]
    assert image_positions(chunks, advance=True).tolist() == [token.place for token in images]

    frozen = [[t.text_before] + [t.text_before + at for at in t.cell] for t in images]
    assert text_positions(chunks, multimodal=True).tolist() == [t.text_before for t in text]
    assert image_positions(chunks, multimodal=True).T.tolist() == frozen
    advanced = [[t.qwen] + [t.qwen + at for at in t.cell] for t in images]
    assert text_positions(chunks, advance=True, multimodal=True).tolist() == [t.qwen for t in text]
    assert image_positions(chunks, advance=True, multimodal=True).T.tolist() == advanced


def test_positions_of_a_hand_written_sample() -> None:
    """Images of 2 and 1 tokens behind the first and the third of four text tokens."""
    chunks = [Chunk(4, (1, 3), (2, 1))]
    assert text_positions(chunks).tolist() == [0, 1, 2, 3]
    assert image_positions(chunks).tolist() == [1, 1, 3]
    assert text_positions(chunks, advance=True).tolist() == [0, 3, 4, 6]
    assert image_positions(chunks, advance=True).tolist() == [1, 2, 5]


@PROPERTY
@given(layouts())
@example(HARD_PACK)
def test_positions_go_on_over_chunks(pack: list[Layout]) -> None:
    """A sample that enters in two pieces has the positions of the whole."""
    options = itertools.product((text_positions, image_positions), (False, True), (False, True))
    for layout, (positions, advance, multimodal) in itertools.product(pack, options):
        whole = positions([layout.chunk()], advance, multimodal)
        for cut in range(layout.text + 1):
            n = sum(point <= cut for point in layout.points)
            counts, rows = layout.image_tokens, layout.rows
            first = Chunk(cut, layout.points[:n], counts[:n], rows[:n])
            second = Chunk(
                layout.text - cut,
                tuple(point - cut for point in layout.points[n:]),
                counts[n:],
                rows[n:],
                past_text=cut,
                past_span=sum(image_spans(first, multimodal)),
            )
            apart = [positions([piece], advance, multimodal) for piece in (first, second)]
            assert np.concatenate(apart, axis=-1).tolist() == whole.tolist()


@PROPERTY
@given(layouts())
@example(HARD_PACK)
def test_interleave_is_the_reading_order(pack: list[Layout]) -> None:
    order, lengths = interleave(chunks_of(pack))
    expected: list[int] = []
    text_start, image_start = 0, sum(layout.text for layout in pack)
    for layout in pack:
        for token in tokens_of(layout):
            expected.append((text_start if token.kind == "text" else image_start) + token.row)
        text_start += layout.text
        image_start += sum(layout.image_tokens)
    assert order.tolist() == expected
    assert lengths == [len(tokens_of(layout)) for layout in pack]


def test_nothing_gives_nothing() -> None:
    """An empty batch has no windows, positions or stream."""
    assert split_windows([]) == []
    assert len(text_positions([])) == len(image_positions([])) == 0
    order, lengths = interleave([])
    assert len(order) == 0 and lengths == []
    assert not has_pair([])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((5, (3, 1), (2, 2)), ["[3, 1]", "sorted"]),
        ((5, (1, 6), (2, 2)), ["[1, 6]", "0..5"]),
        ((5, (-1, 2), (2, 2)), ["[-1, 2]", "0..5"]),
        ((5, (1, 2), (2,)), ["2 insertion points", "[1, 2]", "1 images"]),
        ((5, (), (2, 7, 9)), ["0 insertion points", "3 images"]),
        ((5, (1, 2), (2, 2), (1,)), ["1 values of rows", "2 images"]),
        ((5, (1, 2), (2, 2), (1, 1), (False,)), ["1 values of follows", "2 images"]),
        ((5, (1, 2), (2, 2), (1, 1), (True, False)), ["first image", "following"]),
    ],
)
def test_impossible_chunks_are_refused_with_their_numbers(
    arguments: tuple[Any, ...], named: list[str]
) -> None:
    with pytest.raises(ValueError) as caught:
        Chunk(*arguments)
    for words in named:
        assert words in str(caught.value)
