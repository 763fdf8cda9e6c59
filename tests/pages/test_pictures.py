"""Small pictures for pages."""

from __future__ import annotations

import base64
import io

from PIL import Image

from casa_train.pages import pictures
from tests.helpers.bad_images import encoded, plain


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
