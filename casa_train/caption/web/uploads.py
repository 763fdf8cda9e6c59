"""Videos that may be chosen: those of a folder, and files that visitors bring."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from casa_train.caption.web.limits import MIB, Limits
from casa_train.errors import UserError

HEAD_BYTES = 4096
PREFIX = "casa-caption-"
UNLOCKED_SECONDS = 60  # from a folder's making within which it surely has its lock
CONTAINERS = {
    # offset and bytes that open a file: what it is, as browsers call it
    (0, b"\x1aE\xdf\xa3"): "video/webm",  # Matroska too: browsers play what they can of it
    (0, b"OggS"): "video/ogg",
    (0, b"FLV\x01"): "video/x-flv",
    (0, b"\x00\x00\x01\xba"): "video/mpeg",
    (0, b"\x00\x00\x01\xb3"): "video/mpeg",
    (8, b"AVI "): "video/x-msvideo",
}
# An MP4 or QuickTime file opens with a box of one of these names.
BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")
TS_PACKET = 188
FORMATS = "MP4, QuickTime, WebM, Matroska, AVI, Ogg, FLV or MPEG"


@dataclass
class Video:
    """A file that can be chosen.

    :param url: where a browser finds it.
    :param kind: its media type, by its content.
    :param readers: streams that read it now.
    """

    name: str
    path: Path
    url: str
    kind: str
    readers: int = 0


def media_type(head: bytes) -> str | None:
    """What a file is by its first bytes, whatever it is called; None: no video that is taken.

    Lists of other files (M3U8, concat scripts), which would make a decoder open them, are none.
    """
    for (offset, magic), kind in CONTAINERS.items():
        if head[offset : offset + len(magic)] == magic:
            return kind
    if head[4:8] in BOXES:
        return "video/quicktime" if head[8:12] == b"qt  " else "video/mp4"
    packets = head[::TS_PACKET][:4]
    return "video/mp2t" if len(packets) == 4 and set(packets) == {0x47} else None


def videos_in(folder: Path | None) -> dict[str, Video]:
    """The videos that lie in a folder, by name."""
    try:
        names = [] if folder is None else sorted(path.name for path in folder.iterdir())
    except OSError:  # it was there when the server started
        names = []
    found = {name: video_in(folder, name) for name in names}
    return {name: video for name, video in found.items() if video is not None}


def video_in(folder: Path | None, name: str) -> Video | None:
    """The video of that name in a folder; None: there is none. A link out of it is none."""
    if folder is None or not name.isprintable():
        return None
    path = folder / name
    try:
        if path.resolve().parent != folder.resolve() or not path.is_file():
            return None
        with path.open("rb") as file:
            kind = media_type(file.read(HEAD_BYTES))
    except (OSError, RuntimeError):  # RuntimeError: links in a circle
        return None
    return None if kind is None else Video(name, path, f"/videos/{quote(name)}", kind)


class Uploads:
    """Files of visitors, in a temporary folder that goes with the server.

    What a killed server left, the next one removes: the folder's lock tells whose is in use.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        _sweep(Path(tempfile.gettempdir()))
        self.folder = Path(tempfile.mkdtemp(prefix=PREFIX))
        self._lock = _locked(self.folder)
        self.videos: dict[str, Video] = {}
        self._coming = 0

    async def take(self, name: str, body: AsyncIterator[bytes]) -> str:
        """Writes a visitor's file and returns its id; what is refused leaves nothing behind.

        :raises UserError: it is no video, too large, comes too slowly, or has no room.
        """
        if self._coming >= self.limits.kept_uploads:
            raise UserError(f"{self._coming} uploads are coming in; try again when one is over.")
        identity = secrets.token_hex(8)
        path = self.folder / identity
        self._coming += 1
        try:
            with path.open("wb") as file:
                kind = await self._write(body, file.fileno())
        except BaseException as error:
            path.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise UserError(f"the upload cannot be kept: {error.strerror}.") from error
            raise
        finally:
            self._coming -= 1
        shown = "".join(letter for letter in name[:200] if letter.isprintable())
        video = Video(shown or "upload", path, f"/uploads/{identity}", kind)
        self.videos[identity] = video
        self._make_room()
        return identity

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    async def _write(self, body: AsyncIterator[bytes], file: int) -> str:
        """Returns the media type."""
        size, head, kind = 0, b"", None
        most = self.limits.upload_bytes
        chunks = body.__aiter__()
        while True:
            try:
                chunk = await asyncio.wait_for(chunks.__anext__(), self.limits.silence)
            except StopAsyncIteration:
                break
            except asyncio.TimeoutError:
                raise UserError("the upload stood still; send it again.") from None
            size += len(chunk)
            if size > most:
                raise UserError(f"the file is larger than {most / MIB:g} MB (--max-upload).")
            if kind is None:
                head += chunk
                if len(head) >= HEAD_BYTES:
                    kind = _checked(head)
            _write_all(file, chunk)
        return kind or _checked(head)

    def _make_room(self) -> None:
        """Lets the oldest files go that nobody reads."""
        # Those that are read take no other's place: the newest would be the one to go.
        idle = [identity for identity, v in self.videos.items() if not v.readers]
        for identity in idle[: max(len(idle) - self.limits.kept_uploads, 0)]:
            self.videos.pop(identity).path.unlink(missing_ok=True)


def _locked(folder: Path) -> int | None:
    """The descriptor that holds a folder's lock; None: another process holds it."""
    held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(held)
        return None
    return held


def _sweep(temporary: Path) -> None:
    """Removes this user's folders whose server is no more."""
    for folder in temporary.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # another's, or gone meanwhile
            about = folder.lstat()
            # A new one may not have its lock yet.
            if about.st_uid != os.getuid() or time.time() - about.st_mtime < UNLOCKED_SECONDS:
                continue
            if (held := _locked(folder)) is not None:
                try:
                    shutil.rmtree(folder, ignore_errors=True)
                finally:
                    os.close(held)


def _checked(head: bytes) -> str:
    kind = media_type(head)
    if kind is None:
        raise UserError(f"the file is no video by its content; expected {FORMATS}.")
    return kind


def _write_all(file: int, chunk: bytes) -> None:
    left = memoryview(chunk)
    while left:
        left = left[os.write(file, left) :]
