"""Small pictures for pages."""

from __future__ import annotations

import base64
import io

import pytest
from PIL import Image

from casa_train.pages import pictures
from tests.helpers.bad_images import encoded, noise, plain


def test_thumbnails_are_small_and_on_white() -> None:
    def load(data: bytes) -> Image.Image:
        found = pictures.of_file(data)
        assert found is not None
        return Image.open(io.BytesIO(base64.b64decode(found[0].partition(",")[2])))

    assert load(encoded(plain(size=(1000, 500)))).size == (224, 112)
    assert load(encoded(plain(size=(1600, 2400)), "JPEG")).size == (149, 224)
    assert load(encoded(plain(size=(30, 40)), "WEBP")).size == (30, 40)  # never enlarged
    assert load(encoded(plain("RGBA"))).getpixel((4, 4)) == (255, 255, 255)
    assert load(encoded(plain("L"))).mode == "RGB"
    whole = encoded(plain(size=(400, 400)))
    assert pictures.of_file(b"") is None and pictures.of_file(whole[: len(whole) // 2]) is None


@pytest.mark.parametrize("room", [40_000, 90_000])
def test_jpegs_share_the_room_that_there_is(room: int) -> None:
    small = pictures.jpeg(plain(colour=9), 448)
    large = [pictures.jpeg(noise(600, side), 448) for side in (300, 500)]
    medium = pictures.jpeg(noise(80, 60), 448)
    given = [large[0], small, medium, large[1]]
    assert sum(map(len, large)) > 3 * room and len(small) + len(medium) < room / 3
    fitted = pictures.fitted(given, room)
    assert fitted[1:3] == [small, medium]  # those that need little keep what they have
    assert sum(map(len, fitted)) <= room
    # The large ones get all the rest, but for the steps in which pictures get coarser.
    assert sum(map(len, fitted)) > 0.5 * room
    for data, before in zip(fitted, given, strict=True):
        now, then = Image.open(io.BytesIO(data)), Image.open(io.BytesIO(before))
        assert now.format == "JPEG" and now.size[0] <= then.size[0]
        assert abs(now.size[0] / now.size[1] - then.size[0] / then.size[1]) < 0.02
    assert pictures.fitted(given, 10**7) == given and pictures.fitted([], 5) == []


def test_a_picture_may_always_take_a_kilobyte() -> None:
    whole = pictures.jpeg(noise(448, 300), 448)
    (data,) = pictures.fitted([whole], 1)
    assert 500 < len(data) <= 1024
    with Image.open(io.BytesIO(data)) as image:
        image.load()
