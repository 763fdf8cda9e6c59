"""A camera's newest picture, in place of a camera: pictures in real time; and no camera."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Iterator
from typing import Any

import av
import numpy as np
import pytest

from casa_train.errors import UserError
from casa_train.video import cameras
from casa_train.video.cameras import Live, camera_device
from casa_train.video.frame_sources import open_source
from tests.helpers import videos


def filmed(count: int, rate: float, then: float = 0.0) -> Any:
    """Opens a camera that sends `count` numbered pictures in real time and waits at the end."""

    def pictures() -> Iterator[Any]:
        began = time.monotonic()
        for number, picture in enumerate(videos.numbered(count)):
            time.sleep(max(0.0, began + number / rate - time.monotonic()))
            yield av.VideoFrame.from_ndarray(picture, format="rgb24")
        time.sleep(then)

    return pictures


def test_the_reader_gets_the_newest_and_what_it_missed_is_counted() -> None:
    with Live("toy", 8.0, filmed(25, 12.5), max_pixels=10_000) as source:
        assert source.live and source.size == (64, 48)
        seen = []
        for frame in source:
            seen.append((frame.time, videos.number_of(frame.image)))
            if frame.time == 0.5:
                time.sleep(0.6)
    assert 3 <= source.skipped <= 6
    assert [t for t, _ in seen[:5]] == [0.0, 0.125, 0.25, 0.375, 0.5]
    assert len(seen) + source.skipped in range(14, 18)
    for moment, number in seen[1:]:
        assert abs(number - moment * 12.5) < 3.5, "not the picture of this moment"
    assert source.ended_early == "sends nothing more (it ended)"


def test_closing_ends_it_though_the_device_keeps_its_thread() -> None:
    source = Live("toy", 5.0, filmed(2, 20.0, then=30.0), max_pixels=100)
    threading.Timer(0.5, source.close).start()
    began = time.monotonic()
    assert len(list(source)) in (2, 3, 4)
    assert time.monotonic() - began < 5 and source.ended_early is None


def test_a_camera_that_falls_silent_ends() -> None:
    with Live("toy", 5.0, filmed(2, 20.0, then=30.0), max_pixels=100, patience=0.6) as source:
        assert 3 <= len(list(source)) <= 5
    assert source.ended_early == "has sent no picture for 1 s"


def test_a_camera_without_a_first_picture_is_refused() -> None:
    with pytest.raises(UserError, match="toy: no picture came"):
        Live("toy", 5.0, filmed(0, 1.0, then=3.0), max_pixels=100, patience=0.3)


def test_names_of_cameras() -> None:
    assert camera_device("camera:3") == "/dev/video3"
    assert camera_device("camera:/dev/x") == "/dev/x"
    assert camera_device("/dev/video12") == "/dev/video12"
    assert camera_device("clip.mp4") is None
    with pytest.raises(UserError, match="camera:front"):
        camera_device("camera:front")


def test_what_is_no_camera_is_one_message() -> None:
    with pytest.raises(UserError, match="camera:77: no camera /dev/video77"):
        open_source("camera:77", 2)
    with pytest.raises(UserError, match="/dev/null sends no pictures"):
        open_source("camera:/dev/null", 2)
    with pytest.raises(UserError, match="has no beginning and no end"):
        open_source("camera:0", 2, start=3)


@pytest.mark.parametrize(
    "number, expected",
    [
        (errno.EBUSY, "is used by another program"),
        (errno.EACCES, "group video"),
        (errno.EIO, "cannot be opened"),
    ],
)
def test_a_device_that_refuses(monkeypatch: pytest.MonkeyPatch, number: int, expected: str) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, "refused")

    monkeypatch.setattr(cameras.av, "open", refuse)
    with pytest.raises(UserError, match=expected):
        open_source("camera:/dev/null", 2)


def test_pictures_are_made_small() -> None:
    def large() -> Iterator[Any]:
        picture = np.zeros((300, 400, 3), np.uint8)
        yield av.VideoFrame.from_ndarray(picture, format="rgb24")
        time.sleep(2)

    with Live("toy", 10.0, large, max_pixels=100 * 100) as source:
        frame = next(iter(source))
    assert source.size == (400, 300) and frame.image.size == (115, 86)
