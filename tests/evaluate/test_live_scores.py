"""Scores of live captions, counted by hand."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from casa_train.evaluate.live_scores import ClipCaptions, LiveScore


def score_of(
    *clips: tuple[dict[int, str], dict[int, str], int], first: float = 3.5, step: float = 0.5
) -> dict[str, object]:
    """Clips of so many frames, with the words of some of them.

    :param first: second of the first frame, and :param step: to the next.
    """
    score = LiveScore()
    for due, said, frames in clips:
        times = tuple(first + i * step for i in range(frames))
        texts = (tuple(words.get(i, "") for i in range(frames)) for words in (due, said))
        score.add(ClipCaptions(times, *texts))
    return score.record()


def test_what_is_said_when_it_is_due_matches() -> None:
    found = score_of(({2: "red circle", 9: "Gone"}, {2: "Red  circle", 9: "gone"}, 12))
    assert (found["match"], found["found"], found["median_delay_frames"]) == (1.0, 1.0, 0)
    assert (found["seconds"], found["events"], found["false_words"]) == (2, 2, 0)
    # Frames 0 to 4 and 7 to 11 are within a second of what is due.
    assert found["silent_seconds"] == pytest.approx(2 * 0.5)


def test_words_a_frame_late_in_the_same_second_match_and_in_another_one_do_not() -> None:
    assert score_of(({2: "red"}, {3: "red"}, 8))["match"] == 1.0
    late = score_of(({3: "red"}, {4: "red"}, 8))
    assert (late["match"], late["seconds"]) == (0.0, 2)
    assert (late["median_delay_frames"], late["found"]) == (1, 1.0)


def test_seconds_begin_where_they_do_whatever_the_times_are_in_binary() -> None:
    assert 3.6 + 2 * 0.5 - 3.6 < 1  # what the third frame is past the first
    late = score_of(({1: "red"}, {2: "red"}, 8), first=3.6)
    assert (late["match"], late["seconds"]) == (0.0, 2)


def test_a_frame_early_or_late_is_no_false_word_however_slow_the_frames_are() -> None:
    said = {1: "red", 6: "blue", 9: "oh"}
    found = score_of(({2: "red", 5: "blue"}, said, 10), step=2.0)
    assert (found["found"], found["false_words"]) == (1.0, 1)
    assert found["silent_seconds"] == pytest.approx(4 * 2.0)  # frames 0, 7, 8 and 9
    assert found["median_delay_frames"] == 0  # of -1 and 1


def test_delays_are_those_of_words_in_order() -> None:
    due = {2: "red", 6: "blue", 10: "red", 14: "gone"}
    said = {3: "red", 8: "blue", 10: "red", 13: "gone", 15: "red"}
    found = score_of((due, said, 18))
    assert found["median_delay_frames"] == 0.5  # of 1, 2, 0 and -1
    assert found["found"] == 1.0
    missed = score_of(({2: "red", 4: "blue"}, {3: "red"}, 30))
    assert missed["found"] == 0.5
    assert score_of(({2: "red"}, {20: "red"}, 30))["found"] == 0.0  # nine seconds late


def test_false_words_are_those_in_silence() -> None:
    found = score_of(({2: "red"}, {0: "oh", 4: "red", 9: "no no", 10: "yes"}, 12))
    # Frame 0 is a second away from frame 2, frame 4, too.
    assert found["false_words"] == 3
    assert found["silent_seconds"] == pytest.approx(7 * 0.5)
    assert found["false_words_per_minute"] == pytest.approx(60 * 3 / 3.5)


def test_nothing_due_and_nothing_said_says_nothing() -> None:
    found = score_of(({}, {}, 6))
    assert (found["match"], found["found"], found["median_delay_frames"]) == (None, None, None)
    assert (found["seconds"], found["silent_seconds"]) == (0, pytest.approx(3.0))


def test_clips_add_up() -> None:
    one = ({2: "red"}, {2: "red"}, 6)
    other = ({1: "blue", 4: "red"}, {4: "blue"}, 6)
    assert score_of(one)["match"] == 1.0
    assert score_of(one, other)["match"] == pytest.approx(1 / 3)
    assert score_of(one, other)["clips"] == 2


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    st.lists(st.sampled_from(["", "", "", "red", "blue", "red circle"]), min_size=1, max_size=24),
    st.integers(0, 3),
)
def test_saying_all_that_is_due_some_frames_later(due: list[str], later: int) -> None:
    """Scores are those of the delay, whatever is due."""
    frames = len(due) + later
    said = [""] * later + due
    padded = [*due, *[""] * later]
    score = LiveScore()
    score.add(ClipCaptions(tuple(i / 2 for i in range(frames)), tuple(padded), tuple(said)))
    found = score.record()
    if later == 0:
        assert found["match"] == (1.0 if any(due) else None) and found["false_words"] == 0
    if len(set(due) - {""}) == sum(map(bool, due)) > 0:  # no words twice: nothing is mistaken
        assert found["median_delay_frames"] == later and found["found"] == 1.0
