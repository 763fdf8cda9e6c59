"""Sample and Turn: the one record every source becomes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

RATINGS = ("relevance", "image_correspondence", "visual_dependency", "formatting")
"""What FineVision rates each turn by, from 1 to 5."""


@dataclass(frozen=True)
class ImageSlot:
    """A place in a turn where image `index` of the sample stands."""

    index: int


@dataclass(frozen=True)
class Begin:
    """A place in a turn where another message begins; `role` is "system" or "user"."""

    role: str


Part = str | ImageSlot | Begin


@dataclass(frozen=True)
class Turn:
    """One answer and what was said before it.

    :param user: text interleaved with image slots, a user's message unless it opens with `Begin`;
        empty where an answer follows the one before, or nothing.
    :param assistant: the whole answer as text.
    :param ratings: one for each of `RATINGS`; 0 where the source rates nothing.
    :param live: an answer that goes on while frames arrive (live captioning): the frames
        interleaved with the pieces of `assistant` that follow them.
    :param open: what is here of the answer is a beginning: its end is not learned. The last turn
        alone can be open.
    """

    user: tuple[Part, ...]
    assistant: str
    ratings: tuple[int, ...] = (0,) * len(RATINGS)
    live: tuple[Part, ...] = ()
    open: bool = False

    @property
    def answer(self) -> tuple[Part, ...]:
        """The answer as parts, as `user` is the question."""
        return self.live or (self.assistant,)

    @property
    def images(self) -> tuple[int, ...]:
        """The images that this turn shows, in order."""
        return tuple(p.index for p in (*self.user, *self.live) if isinstance(p, ImageSlot))


@dataclass(frozen=True)
class Sample:
    """A conversation about zero or more images, still encoded as the source stored them.

    Every image is shown exactly once, in the order of `images`.

    :param key: unique within its dataset directory; it is also the tar member stem.
    :param source: the subset it came from; metrics and mixtures go by this name.
    :param images: original file bytes (JPEG, PNG or WebP).
    :param video: whether the images are the frames of one video, in order.
    :param repaired: short names of what a schema had to put right; recipes count them.
    :param times: of a video, the second that each image shows.
    """

    key: str
    source: str
    turns: tuple[Turn, ...]
    images: tuple[bytes, ...]
    video: bool = False
    repaired: tuple[str, ...] = ()
    times: tuple[float, ...] = ()

    @property
    def open(self) -> bool:
        """Whether the last answer is left open: the processor's `continue_final`."""
        return bool(self.turns) and self.turns[-1].open

    @property
    def is_live(self) -> bool:
        """Whether it is one answer over all of its images, so that it can be cut at each."""
        slots = [p for t in self.turns for p in t.live if isinstance(p, ImageSlot)]
        return len(self.turns) == 1 and 0 < len(slots) == len(self.images)

    def messages(self, images: list[Any] | None = None) -> list[dict[str, Any]]:
        """The conversation as the processor's messages.

        :param images: what to put into the image slots, by index; None leaves every slot empty.
        """
        return messages_of(self.turns, self.video, lambda i: None if images is None else images[i])


def messages_of(
    turns: Iterable[Turn], video: bool, image: Callable[[int], Any]
) -> list[dict[str, Any]]:
    """Turns as the processor's messages. Frames with no text between them are one part of "video".

    :param video: whether the images are the frames of one video.
    :param image: what to put into the image slot of this index.
    """
    messages: list[dict[str, Any]] = []

    def begin(role: str) -> list[dict[str, Any]]:
        content: list[dict[str, Any]] = []
        messages.append({"role": role, "content": content})
        return content

    def fill(role: str, parts: tuple[Part, ...]) -> None:
        content = None if parts and isinstance(parts[0], Begin) else begin(role)
        for part in parts:
            if isinstance(part, Begin):
                content = begin(part.role)
                continue
            assert content is not None
            if isinstance(part, str):
                content.append({"type": "text", "text": part})
            elif not video:
                content.append({"type": "image", "image": image(part.index)})
            elif content and content[-1]["type"] == "video":
                content[-1]["video"].append(image(part.index))
            else:
                content.append({"type": "video", "video": [image(part.index)]})

    for turn in turns:
        if turn.user:
            fill("user", turn.user)
        fill("assistant", turn.answer)
    return messages


def keep_images(sample: Sample, kept: Collection[int]) -> Sample:
    """The sample with only these images; the slots of the others vanish and text stays.

    In a live answer the text of a frame that goes joins the window of the frame before it.
    """
    order = sorted(kept)
    new = {old: ImageSlot(position) for position, old in enumerate(order)}

    def parts(old: tuple[Part, ...]) -> tuple[Part, ...]:
        moved = (new.get(part.index) if isinstance(part, ImageSlot) else part for part in old)
        return tuple(part for part in moved if part is not None)

    turns = tuple(replace(t, user=parts(t.user), live=parts(t.live)) for t in sample.turns)
    times = tuple(sample.times[i] for i in order) if sample.times else ()
    return replace(sample, turns=turns, images=tuple(sample.images[i] for i in order), times=times)


def cut_answer(sample: Sample, frames: int) -> Sample:
    """The first frames of a live sample, each with its text; the answer is left open.

    The stream goes on behind the cut, so the last frame that stays keeps all of its text, what says
    that it waits for the next one included, and no end of an answer is learned: the text of a cut
    sample is the beginning of that of the whole one, token for token.

    :param sample: one that `is_live`.
    :param frames: how many stay, at least 1.
    """
    (turn,) = sample.turns
    if frames >= len(sample.images):
        return sample
    kept = turn.live[: turn.live.index(ImageSlot(frames))]
    said = "".join(part for part in kept if isinstance(part, str))
    turn = replace(turn, assistant=said, live=kept, open=True)
    images, times = sample.images[:frames], sample.times[:frames]
    return replace(sample, turns=(turn,), images=images, times=times)


def filter_turns(sample: Sample, minimum: Mapping[str, int]) -> Sample:
    """The sample without the turns that are rated below `minimum`; turns may be empty after it.

    A turn that is not rated stays. The images of a dropped turn move to the next kept turn if that
    shows none of its own, since it asks about what was shown last; otherwise they go with their
    turn. `data.prepared.ratings` computes the same from an index.

    :param minimum: by name of the rating, out of `RATINGS`.
    """
    turns: list[Turn] = []
    shown: list[int] = []
    carried: list[int] = []
    for turn in sample.turns:
        if any(0 < turn.ratings[RATINGS.index(name)] < least for name, least in minimum.items()):
            carried += turn.images
            continue
        if carried and not turn.images:
            turn = replace(turn, user=(*map(ImageSlot, carried), *turn.user))
        shown += turn.images
        carried = []
        turns.append(turn)
    return keep_images(replace(sample, turns=tuple(turns)), shown)
