"""Rows of the published datasets -> Sample, and turns that are filtered by rating."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from casa_train.data.sample import (
    RATINGS,
    Begin,
    ImageSlot,
    Sample,
    Turn,
    filter_turns,
    keep_images,
)
from casa_train.data.schemas.rows import (
    PLACEHOLDER,
    SCHEMAS,
    BadRow,
    finevision,
    llava_onevision,
)
from casa_train.data.schemas.video_rows import FRAME_END, live_whisperx, llava_video
from tests.helpers.published import live_line, video_row

QUESTION, ANSWER = "What is it?", "A cat."


def onevision(conversations: Any, images: int = 1, **columns: Any) -> Sample:
    row = {"id": "1", "conversations": conversations, "data_source": "gqa", **columns}
    return llava_onevision("k", row, [b"image"] * images)


def fine(texts: Any, images: int = 0, **columns: Any) -> Sample:
    return finevision("k", {"texts": texts, "source": "s", **columns}, [b"i"] * images)


def pairs(*turns: str) -> list[dict[str, str]]:
    return [{"user": turn, "assistant": "a"} for turn in turns]


# ------------------------------------------------------------------------------ one image


@pytest.mark.parametrize(
    "conversations",
    [
        [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}],
        [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}],
        [
            {"content": None, "from": "human", "role": None, "value": QUESTION},
            {"content": None, "from": "gpt", "role": None, "value": ANSWER},
        ],
        [
            {"content": QUESTION, "from": None, "role": "user", "value": None},
            {"content": ANSWER, "from": None, "role": "assistant", "value": None},
        ],
        [
            {"from": "human", "value": QUESTION, "data_source": "gqa"},
            {"from": "gpt", "value": ANSWER, "data_source": "gqa"},
        ],
    ],
    ids=["role", "from", "null-filled from", "null-filled role", "source inside"],
)
def test_every_form_of_a_message_gives_one_turn(conversations: Any) -> None:
    sample = onevision(conversations)
    assert sample.turns == (Turn((ImageSlot(0), QUESTION), ANSWER),)
    assert sample.source == "gqa" and sample.repaired == () and not sample.video


def test_a_placeholder_says_where_the_image_stands() -> None:
    messages = [
        {"from": "human", "value": "Hello."},
        {"from": "gpt", "value": "Hi."},
        {"from": "human", "value": "Look:\n<image>\nWhat is it?"},
        {"from": "gpt", "value": "A <image> cat."},
    ]
    sample = onevision(messages)
    assert sample.turns[0].user == ("Hello.",)
    assert sample.turns[1] == Turn(("Look:", ImageSlot(0), QUESTION), "A  cat.")
    assert sample.repaired == ("placeholder_removed",)  # the one in the answer


def test_every_message_stays_one_of_its_own() -> None:
    messages = [
        {"role": "assistant", "content": "an answer to nothing"},
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What"},
        {"role": "user", "content": "is it?"},
        {"role": "assistant", "content": ANSWER},
        {"role": "assistant", "content": "Really."},
        {"role": "user", "content": "a question without answer"},
    ]
    sample = onevision(messages, images=0)
    user = (Begin("system"), "Be brief.", Begin("user"), "What", Begin("user"), "is it?")
    assert sample.turns == (Turn(user, ANSWER), Turn((), "Really."))
    assert sample.messages() == [
        {"role": message["role"], "content": [{"type": "text", "text": message["content"]}]}
        for message in messages[1:-1]
    ]
    assert sample.repaired == ("empty_turn_dropped",)


def test_a_system_prompt_outlives_a_turn_that_is_dropped() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "<image>Who?"},
        {"role": "assistant", "content": " "},
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": ANSWER},
    ]
    sample = onevision(messages)
    user = (Begin("system"), "Be brief.", Begin("user"), ImageSlot(0), QUESTION)
    assert sample.turns == (Turn(user, ANSWER),)
    assert sample.repaired == ("empty_turn_dropped",)


FORMS = {
    "role": ("role", "content", {"system": "system", "user": "user", "assistant": "assistant"}),
    "from": ("from", "value", {"system": "system", "user": "human", "assistant": "gpt"}),
}
words = st.text("ab \n<>.", max_size=4)
said = words.filter(str.strip)


@st.composite
def llava_conversations(draw: st.DrawFn) -> tuple[list[tuple[str, list[str]]], int]:
    """Messages as (role, texts with an image between each two), and how many images stand in front.

    Every turn has a question and an answer in words; whatever else is said may be empty.
    """
    placed = draw(st.booleans())
    messages: list[tuple[str, list[str]]] = []
    if draw(st.booleans()):
        messages.append(("system", [draw(words)]))
    for _ in range(draw(st.integers(1, 3))):
        roles = draw(st.lists(st.sampled_from(["system", "user", "user"]), max_size=3))
        roles.insert(draw(st.integers(0, len(roles))), "question")
        for role in roles:
            texts = [draw(words)]
            if placed and role != "system":
                texts += draw(st.lists(words, max_size=2))
            if role == "question":
                texts[draw(st.integers(0, len(texts) - 1))] = draw(said)
            messages.append(("user" if role == "question" else role, texts))
        messages.append(("assistant", [draw(said)]))
        messages += [("assistant", [text]) for text in draw(st.lists(words, max_size=2))]
    return messages, 0 if placed else draw(st.integers(0, 2))


@settings(max_examples=300, deadline=None)
@given(llava_conversations(), st.sampled_from(sorted(FORMS)))
def test_a_sample_has_the_messages_of_its_row(
    conversation: tuple[list[tuple[str, list[str]]], int], form: str
) -> None:
    """All of them, each its own, in order; none that is empty."""
    messages, in_front = conversation
    role_field, text_field, names = FORMS[form]
    row = [{role_field: names[r], text_field: PLACEHOLDER.join(texts)} for r, texts in messages]
    images = in_front + sum(len(texts) - 1 for _, texts in messages)
    numbers = iter(range(images))
    expected: list[dict[str, Any]] = []
    for role, texts in messages:
        content: list[dict[str, Any]] = []
        for i, text in enumerate(texts):
            if i:
                content.append({"type": "image", "image": next(numbers)})
            if text.strip():
                content.append({"type": "text", "text": text.strip()})
        if content:
            expected.append({"role": role, "content": content})
    first = next(message for message in expected if message["role"] == "user")
    first["content"][:0] = [{"type": "image", "image": i} for i in numbers]

    sample = onevision(row, images)
    assert sample.messages(list(range(images))) == expected
    empty = len(expected) < len(messages)
    assert sample.repaired == (("empty_turn_dropped",) if empty else ())
    assert [turn.assistant for turn in sample.turns] == [
        message["content"][0]["text"] for message in expected if message["role"] == "assistant"
    ]


def test_the_source_may_stand_in_a_turn_or_be_the_subset() -> None:
    turns = [{"from": "human", "value": QUESTION, "data_source": "inner"}]
    answer = {"from": "gpt", "value": ANSWER}
    inner = onevision([*turns, answer], data_source=None, subset="gqa")
    assert inner.source == "inner" and inner.repaired == ("source_from_elsewhere",)
    turns[0].pop("data_source")
    assert onevision([*turns, answer], data_source=None, subset="gqa").source == "gqa"


@pytest.mark.parametrize(
    ("conversations", "columns", "reason"),
    [
        (None, {}, "no_turns"),
        ("text", {}, "no_turns"),
        ([], {}, "no_turns"),
        ([None, None], {}, "no_turns"),
        ([{"from": "human", "value": None}, {"from": "gpt", "value": ANSWER}], {}, "no_turns"),
        ([{"from": "narrator", "value": QUESTION}], {}, "unknown_role"),
        (
            [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}],
            {"data_source": None},
            "no_source",
        ),
        (
            [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": ANSWER}],
            {},
            "missing_image",
        ),
    ],
)
def test_unusable_rows_have_a_reason(conversations: Any, columns: Any, reason: str) -> None:
    with pytest.raises(BadRow) as caught:
        onevision(conversations, images=0, **columns)
    assert caught.value.reason == reason


# ------------------------------------------------------------------------------ ratings


def test_ratings_stay_with_their_turns() -> None:
    texts = [*pairs("one"), {"user": "", "assistant": "a"}, None, *pairs("four")]
    sample = fine(texts, relevance_ratings=[5, 4, None, 2], formatting_ratings=None)
    assert [turn.ratings for turn in sample.turns] == [(5, 0, 0, 0), (2, 0, 0, 0)]
    assert sample.repaired == ("empty_turn_dropped",)


@pytest.mark.parametrize("ratings", [[5], [5, 5, 5], "55", 5, [9, 1], ["5", 1]])
def test_ratings_that_do_not_fit_count_as_unrated(ratings: Any) -> None:
    sample = fine(pairs("one", "two"), relevance_ratings=ratings)
    assert sample.turns[0].ratings[0] == 0
    assert sample.repaired == ("ratings_ignored",)


def test_an_image_of_an_empty_last_turn_is_shown_in_front() -> None:
    sample = fine([*pairs("<image>one"), {"user": "<image>", "assistant": ""}], images=2)
    assert sample.turns[0].user == (ImageSlot(0), ImageSlot(1), "one")


def rated(*turns: tuple[str, int], images: int) -> Sample:
    ratings = [rating for _, rating in turns]
    return fine(pairs(*(text for text, _ in turns)), images, relevance_ratings=ratings)


@pytest.mark.parametrize(
    ("turns", "images", "expected"),
    [
        # Images of the whole sample stay with what is left of it.
        ([("a", 1), ("b", 5)], 2, [(0, 1, "b")]),
        # A later turn about the same image keeps it.
        ([("<image>a", 1), ("b", 5)], 1, [(0, "b")]),
        # The images of others neither move nor change.
        ([("<image>a", 5), ("<image>b", 1), ("<image>c", 5)], 3, [(0, "a"), (2, "c")]),
        ([("<image>a", 1), ("<image>b", 5)], 2, [(1, "b")]),
        ([("<image>a", 5), ("<image>b", 1), ("c", 5)], 2, [(0, "a"), (1, "c")]),
        ([("<image>a", 5), ("<image>b", 1)], 2, [(0, "a")]),
        ([("<image>a", 1)], 1, []),
    ],
)
def test_dropping_a_turn_neither_orphans_nor_shifts_images(
    turns: list[tuple[str, int]], images: int, expected: list[tuple[Any, ...]]
) -> None:
    sample = rated(*turns, images=images)
    sample = Sample("k", "s", sample.turns, tuple(b"%d" % i for i in range(images)))
    left = filter_turns(sample, {"relevance": 3})
    shown = [
        tuple(
            int(left.images[part.index]) if isinstance(part, ImageSlot) else part
            for part in turn.user
        )
        for turn in left.turns
    ]
    assert shown == expected
    assert [i for turn in left.turns for i in turn.images] == list(range(len(left.images)))


def test_turns_without_a_rating_stay() -> None:
    sample = fine(pairs("a", "b"), relevance_ratings=[None, 1])
    assert [t.user for t in filter_turns(sample, {"relevance": 5, "formatting": 5}).turns] == [
        ("a",)
    ]


turn_lists = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 5)), min_size=1, max_size=6)


@settings(max_examples=100, deadline=None)
@given(turn_lists, st.integers(1, 5))
def test_any_filter_shows_every_kept_image_once(turns: list[tuple[int, int]], least: int) -> None:
    numbers = iter(range(20))
    sample = Sample(
        "k",
        "s",
        tuple(
            Turn((*(ImageSlot(next(numbers)) for _ in range(n)), f"q{i}"), "a", (0, rating, 0, 0))
            for i, (n, rating) in enumerate(turns)
        ),
        tuple(b"%d" % i for i in range(sum(n for n, _ in turns))),
    )
    left = filter_turns(sample, {RATINGS[1]: least})
    assert [i for turn in left.turns for i in turn.images] == list(range(len(left.images)))
    kept = [f"q{i}" for i, (_, rating) in enumerate(turns) if rating == 0 or rating >= least]
    assert [turn.user[-1] for turn in left.turns] == kept


# ------------------------------------------------------------------------------ video


def test_the_frames_of_a_video_stand_at_its_placeholder() -> None:
    row = {**video_row(1, "academic_source/Charades/6D1DF.mp4"), "frame_times": [0.0, 0.5, 1.0]}
    sample = llava_video("k", row, [b"a", b"b", b"c"])
    (turn,) = sample.turns
    assert turn.user == (*map(ImageSlot, range(3)), "Please describe the video.")
    assert sample.video
    (user, _) = sample.messages(list("xyz"))
    assert user["content"][0] == {"type": "video", "video": ["x", "y", "z"]}
    assert sample.source == "0_30_s_academic_v0_1" and sample.repaired == ()


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("../../etc/passwd", "unsafe_path"),
        ("a/../../b.mp4", "unsafe_path"),
        ("/etc/passwd", "unsafe_path"),
        ("file:///etc/passwd", "unsafe_path"),
        ("https://example.org/x.mp4", "unsafe_path"),
        ("a\\..\\b.mp4", "unsafe_path"),
        ("", "no_video"),
        (None, "no_video"),
        (7, "no_video"),
    ],
)
def test_paths_that_leave_the_dataset_are_refused(path: Any, reason: str) -> None:
    row = {**video_row(1, path), "frame_times": [0.0]}
    with pytest.raises(BadRow) as caught:
        llava_video("k", row, [b"a"])
    assert caught.value.reason == reason


def live(words: Any, times: list[float], **changes: Any) -> Sample:
    row = {"messages": live_line("video/x.mp4", 10.0, 13.0, words), "frame_times": times}
    return live_whisperx("k", {**row, **changes}, [b"%d" % i for i in range(len(times))])


def test_captions_follow_the_frame_at_which_they_have_been_spoken() -> None:
    words = [[9.9, 10.0, "We"], [10.1, 10.3, " start "], [10.3, 10.5, "here."], [11.6, 12.4, "End"]]
    sample = live(words, [10.0, 10.5, 11.0, 11.5, 12.0])
    (turn,) = sample.turns
    assert turn.live == (
        ImageSlot(0),
        " We" + FRAME_END,
        ImageSlot(1),
        " start here." + FRAME_END,
        ImageSlot(2),
        FRAME_END,
        ImageSlot(3),
        FRAME_END,
        ImageSlot(4),
        " End",
    )
    assert turn.user == ("Comment on it.\nA grey wall",)
    assert turn.assistant == f" We{FRAME_END} start here.{FRAME_END}{FRAME_END}{FRAME_END} End"
    assert turn.images == tuple(range(5)) and sample.video
    user, assistant = sample.messages(list("abcde"))
    assert [part["type"] for part in assistant["content"][:3]] == ["video", "text", "video"]
    assert [p["video"] for p in assistant["content"] if p["type"] == "video"] == [
        *map(list, "abcde")
    ]
    assert user["content"] == [{"type": "text", "text": "Comment on it.\nA grey wall"}]


def test_words_without_times_or_letters_are_dropped() -> None:
    words = [[None, None, "lost"], [10.0, None, "kept"], [1, 2], None, [10.0, 10.1, " "]]
    sample = live(words, [10.0, 10.5])
    assert sample.turns[0].live[1] == " kept" + FRAME_END
    assert sample.repaired == ("word_dropped",)


def test_a_word_that_is_how_frames_end_is_none() -> None:
    """A captioner would stop in the middle of what it learned to say."""
    words = [[10.0, 10.1, "well"], [10.1, 10.2, "..."], [10.2, 10.3, "so..."], [10.3, 10.4, "on"]]
    sample = live(words, [10.5, 11.0])
    assert sample.turns[0].live[1] == " well so... on" + FRAME_END
    assert sample.repaired == ("word_dropped",)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"messages": None}, "not_a_live_row"),
        ({"messages": [0, 135, 270]}, "not_a_live_row"),
        ({"messages": live_line("../x.mp4", 0, 1, [[0, 1, "a"]])}, "unsafe_path"),
        ({"messages": live_line("x.mp4", 0, 1, [])}, "no_words"),
        ({"frame_times": None}, "no_frames"),
        ({"frame_times": [10.0, 10.5, 11.0]}, "no_frames"),
    ],
)
def test_unusable_live_rows_have_a_reason(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRow) as caught:
        live([[10.0, 10.2, "a"]], [10.0, 10.5], **changes)
    assert caught.value.reason == reason


def test_leaving_out_frames_keeps_every_word() -> None:
    sample = live([[10.0, 10.0, "one"], [10.1, 10.5, "two"]], [10.0, 10.5, 11.0])
    left = keep_images(sample, {0, 2})
    assert left.images == (b"0", b"2")
    assert left.turns[0].live == (
        ImageSlot(0),
        " one" + FRAME_END,
        " two" + FRAME_END,
        ImageSlot(1),
    )


# ------------------------------------------------------------------------------ anything

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 99) | st.floats(0, 9) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["role", "content", "from", "value", "user", "assistant", "type", "video"]
                + ["text", "text_stream", "data_source"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
columns = st.sampled_from(
    ["texts", "source", "conversations", "data_source", "video", "messages", "frame_times"]
    + ["subset", *(f"{name}_ratings" for name in RATINGS)]
)
spoken = st.builds(
    lambda words: live_line("a.mp4", 0, 9, words), st.lists(json_values | st.none(), max_size=4)
) | st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": json_values}),
    max_size=3,
)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(sorted(SCHEMAS)),
    st.dictionaries(columns, json_values, max_size=6),
    st.none() | spoken,
    st.integers(0, 3),
    st.none() | json_values,
)
def test_no_row_does_more_than_be_refused(
    schema: str, row: dict[str, Any], messages: Any, images: int, time: Any
) -> None:
    if messages is not None:
        times = [i / 2 if time is None else time for i in range(images)]
        video = row.get("video", "a.mp4")
        row = {**row, "messages": messages, "frame_times": times, "video": video}
    try:
        sample = SCHEMAS[schema]("k", row, [b"image"] * images)
    except BadRow as error:
        assert error.reason.isidentifier()
        return
    assert sample.turns and sample.source
    assert [i for turn in sample.turns for i in turn.images] == list(range(images))
    sample.messages([None] * images)


@pytest.mark.parametrize(
    ("spoken", "expected"),
    [
        # An empty answer ends nothing where a real one follows, and its question where not.
        ("user q | assistant | assistant real", "user q | assistant real"),
        ("user q | assistant | user r | assistant b", "user r | assistant b"),
        (
            "user q | assistant a | system s | assistant b",
            "user q | assistant a | system s | assistant b",
        ),
        ("assistant a | user q | assistant b | user left", "user q | assistant b"),
    ],
)
def test_no_answer_is_lost_beside_an_empty_one(spoken: str, expected: str) -> None:
    def messages(text: str) -> list[tuple[str, str]]:
        pairs = [part.strip().partition(" ") for part in text.split("|")]
        return [(role, words) for role, _, words in pairs]

    turns = [{"role": role, "content": words} for role, words in messages(spoken)]
    sample = llava_onevision("k", {"conversations": turns, "data_source": "s"}, [])
    found = [(m["role"], m["content"][0]["text"]) for m in sample.messages()]
    assert found == messages(expected)


def test_an_image_stands_where_the_first_question_has_words() -> None:
    """Placeholders that are noise leave an empty message behind, which is no place for it."""
    turns = [("user", "<image><image>"), ("user", "what?"), ("assistant", "a cat")]
    row = {"conversations": [{"role": r, "content": c} for r, c in turns], "data_source": "s"}
    (turn,) = llava_onevision("k", row, [b"image"]).turns
    assert turn.user == (ImageSlot(0), "what?")
