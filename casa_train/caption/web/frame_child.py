"""python -m casa_train.caption.web.frame_child FILE TITLE FPS PIXELS: decodes a video that
anybody may have made.

Frames go to standard output as messages: a letter, the length of what follows (big endian, 4 bytes)
and that: I what is known of the video (JSON), F a frame (seconds as a double, width, height, then
its RGB bytes), E what is wrong with it (text), and D its end, with the reason where that is an
early one. The limits stand before anything that decodes is imported; whoever takes over a decoder
can fill no disk, no memory and no processor.
"""

from __future__ import annotations

import json
import os
import resource
import struct
import sys
from typing import BinaryIO

# Of addresses: libraries and threads take 1 GiB of them, a film of 4K one more.
MEMORY_BYTES = 4 << 30
FRAME_CPU_SECONDS = 60  # from one frame to the next
MOST_TEXT = 4000  # bytes of a message that is no frame
MESSAGE = struct.Struct(">cI")
FRAME = struct.Struct(">dII")


def limit_oneself() -> None:
    """Limits memory, files and processor time of this process, before it reads the video."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    allow_more_time()


def allow_more_time() -> None:
    """A frame may take so much of the processor; the next one as much again."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    allowed = int(used.ru_utime + used.ru_stime) + FRAME_CPU_SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (allowed, resource.RLIM_INFINITY))


def send(out: BinaryIO, kind: bytes, *parts: bytes) -> None:
    out.write(MESSAGE.pack(kind, sum(map(len, parts))))
    for part in parts:
        out.write(part)
    out.flush()


def main() -> int:
    """Decodes until the end of the video, or until nobody reads."""
    name, title, fps, pixels = sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[4])
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no message
    limit_oneself()
    # After the limits: these load the libraries that decode.
    from casa_train.errors import UserError
    from casa_train.video.frame_sources import open_source

    try:
        # An open file, so that what stands in it as a name of another is not looked for.
        with open_source(open(name, "rb"), fps, max_pixels=pixels, title=title) as source:
            about = {"duration": source.duration}
            send(out, b"I", json.dumps(about).encode())
            for frame in source:
                size = FRAME.pack(frame.time, *frame.image.size)
                send(out, b"F", size, frame.image.convert("RGB").tobytes())
                allow_more_time()
            send(out, b"D", (source.ended_early or "").encode()[:MOST_TEXT])
    except BrokenPipeError:
        return 0
    except UserError as error:
        send(out, b"E", str(error).encode()[:MOST_TEXT])
    except MemoryError:
        send(out, b"E", b"decoding it takes more memory than is allowed; use a smaller one.")
    return 0


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)  # a decoder's threads are not waited for
