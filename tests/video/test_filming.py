"""Written files show their pictures, at their times, in the same bytes."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from casa_train.video.filming import write_film

COLOURS = ("navy", "teal", "gold", "maroon", "gold")


def pictures(side: int = 34) -> list[Image.Image]:
    return [Image.new("RGB", (side + 6, side), colour) for colour in COLOURS]


def test_a_file_shows_its_pictures(tmp_path: Path) -> None:
    write_film(tmp_path / "a.mp4", pictures(), 7)
    with av.open(str(tmp_path / "a.mp4")) as container:
        frames = list(container.decode(video=0))
    assert [frame.time for frame in frames] == pytest.approx([i / 7 for i in range(5)], abs=1e-4)
    assert {(frame.width, frame.height) for frame in frames} == {(40, 34)}
    for frame, picture in zip(frames, pictures(), strict=True):
        seen = frame.to_ndarray(format="rgb24").astype(int)
        assert np.abs(seen - np.asarray(picture, int)).max() < 12


def test_the_same_pictures_are_the_same_bytes(tmp_path: Path) -> None:
    noise = np.random.default_rng(3).integers(0, 255, (4, 48, 48, 3), np.uint8)
    for name in "ab":
        write_film(tmp_path / name, map(Image.fromarray, noise), 3)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_film_without_pictures_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="without pictures"):
        write_film(tmp_path / "a.mp4", [], 7)
