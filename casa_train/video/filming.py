"""Pictures -> a video file."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import av
from PIL import Image

QUALITY = 20  # constant rate factor of H.264


def write_film(path: Path, pictures: Iterable[Image.Image], fps: int) -> None:
    """Writes H.264 in an MP4 file, the same bytes on every run; it is meant for small pictures.

    :param pictures: RGB, all of one size with even sides.
    :raises ValueError: there is none.
    :raises OSError: the file cannot be written.
    """
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.pix_fmt = "yuv420p"
        stream.options = {"preset": "ultrafast", "crf": str(QUALITY), "threads": "1"}
        empty = True
        for picture in pictures:
            if empty:
                stream.width, stream.height = picture.size
                empty = False
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        if empty:
            raise ValueError(f"{path}: a film without pictures")
        container.mux(stream.encode(None))
