"""Holding samples out: which ones, and that no image stands on both sides.

While a subset is read, each job sets aside the samples whose first image has a small digest, a few
more than are asked for. Once all is read, whole groups of them go to validation, smallest digests
first: a group is all samples that share an image, and one of which a sample was not set aside
stays in training, with all that is left over. So the choice follows from the images alone,
whatever the number of processes and however often the recipe was ended.

An image is its bytes. Frames stand for their video, which has a path. A sample without images is
its text.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from casa_train.errors import UserError

if TYPE_CHECKING:
    from casa_train.data.prepared.shard_writer import Count, Shard

ASIDE = "set_aside"  # folder of what is undecided, while the recipe runs
SHARD = 2000  # samples
ROOM = 2, 200  # set aside are so many times what is asked for, and so many more
DIGESTS = 1 << 64


@dataclass(frozen=True)
class HoldOut:
    """What is asked for.

    :param samples: held out at most.
    :param bound: samples whose first digest is below it are set aside.
    """

    samples: int
    bound: int

    @classmethod
    def of(cls, samples: int, rows: int) -> HoldOut:
        """:param rows: of the input, about.

        :raises UserError: nothing would be left to train on.
        """
        if samples >= rows:
            raise UserError(
                f"--validation is {samples}, but there are {rows} rows; expected fewer, so that "
                "something is left to train on."
            )
        factor, more = ROOM
        return cls(samples, min(DIGESTS, (factor * samples + more) * DIGESTS // rows))


def digests_of(row: Mapping[str, Any], images: Sequence[bytes], video: str | None) -> list[int]:
    """What identifies the images of a sample: none of them may stand on both sides."""
    if video is not None:
        shown = [video.encode()]
    else:
        shown = list(images) or [json.dumps(row, sort_keys=True).encode()]
    return [int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") for data in shown]


class Aside:
    """What one job sets aside, beside the digests of what it does not.

    :param train: the shard of the job in the training split.
    """

    def __init__(self, train: Shard, hold_out: HoldOut) -> None:
        self.train, self.bound = train, hold_out.bound
        folder = train.directory.parent / ASIDE
        self.shard = type(train)(folder, train.number, train.schema, train.count)
        self._candidates: dict[str, list[int]] = {}
        self._trained: list[int] = []

    def write(
        self, key: str, row: Mapping[str, Any], images: Sequence[bytes], video: str | None
    ) -> None:
        """Adds one row to the training split or to what is set aside."""
        digests = digests_of(row, images, video)
        if digests[0] >= self.bound:
            if self.train.write(key, row, images):
                self._trained += digests
        elif self.shard.write(key, row, images):
            self._candidates[key] = digests

    def finish(self, consumed: Mapping[str, Any]) -> None:
        """Closes both shards, the training split's last: it says that the job is done."""
        self.train.skipped.update(self.shard.skipped)
        folder, number = self.shard.directory, self.shard.number
        _candidates_path(folder, number).write_text(json.dumps(self._candidates))
        np.save(_trained_path(folder, number), np.array(self._trained, np.uint64))
        self.shard.finish(consumed)
        self.train.finish({**consumed, "set_aside": len(self.shard)})


def set_aside(train: Path, number: int) -> bool:
    """Whether what a job set aside is whole."""
    from casa_train.data.prepared.shard_writer import finished_shard

    return finished_shard(train.parent / ASIDE, number) is not None


def divide(
    train: Path, shards: int, schema: str, count: Count, hold_out: HoldOut
) -> tuple[int, int]:
    """Writes the shards of the validation split, and of the training split what is left over.

    :param shards: of the training split so far; the others follow them.
    :return: how many shards the training split has now, and the validation split.
    :raises UserError: nothing can be held out, or nothing is left to train on.
    """
    folder = train.parent / ASIDE
    candidates: dict[str, list[int]] = {}
    for number in range(shards):
        candidates |= json.loads(_candidates_path(folder, number).read_text())
    trained = np.concatenate(
        [np.load(_trained_path(folder, n)) for n in range(shards)] or [np.zeros(0, np.uint64)]
    )
    chosen = choose(candidates, trained, hold_out.samples)
    if not chosen:
        raise UserError(
            f"--validation {hold_out.samples}: no sample can be held out, because all share images "
            "with more samples than that. Ask for more, or leave it out; delete "
            f"{train.parent} first."
        )
    if len(chosen) == len(candidates) and not len(trained):
        raise UserError(
            f"--validation {hold_out.samples} holds out all {len(chosen)} samples; expected fewer, "
            f"so that something is left to train on. Delete {train.parent} first."
        )
    if len(chosen) < hold_out.samples:
        print(
            f"{train.parent}: {len(chosen)} samples are held out, not {hold_out.samples}: others "
            "share images with samples that are not"
        )
    stored = [sample for number in range(shards) for sample in _stored(folder, number)]
    validation = [sample for sample in stored if sample[0] in chosen]
    left = [sample for sample in stored if sample[0] not in chosen]
    _write(train.parent / "validation", 0, validation, schema, count)
    _write(train, shards, left, schema, count)
    return shards + _shards(len(left)), _shards(len(validation))


def forget(train: Path) -> None:
    """Removes what was set aside, once it is decided."""
    shutil.rmtree(train.parent / ASIDE, ignore_errors=True)


def choose(candidates: Mapping[str, Sequence[int]], trained: np.ndarray, samples: int) -> set[str]:
    """Keys of whole groups that share no digest with others, `samples` at most.

    :param candidates: by key, the digests of its images.
    :param trained: digests of samples that are trained in any case.
    """
    groups: dict[int, int] = {}  # a digest -> another one of its group, at last to one that is own

    def root(digest: int) -> int:
        while groups[digest] != digest:
            groups[digest] = groups[groups[digest]]
            digest = groups[digest]
        return digest

    for digests in candidates.values():
        for digest in digests:
            groups.setdefault(digest, digest)
            one, other = sorted((root(digests[0]), root(digest)))
            groups[other] = one  # so the root is the smallest
    members: dict[int, list[str]] = {}
    for key, digests in candidates.items():
        members.setdefault(root(digests[0]), []).append(key)
    everything = np.fromiter(groups, np.uint64, len(groups))
    for digest in everything[np.isin(everything, trained)].tolist():
        members.pop(root(digest), None)
    chosen: set[str] = set()
    for _, keys in sorted(members.items()):
        if len(chosen) + len(keys) <= samples:
            chosen.update(keys)
    return chosen


Stored = tuple[str, dict[str, Any], list[bytes]]


def _stored(folder: Path, number: int) -> Iterator[Stored]:
    """Key, row and images of the samples of a shard, in order."""
    from casa_train.data.prepared.shard_writer import shard_name
    from casa_train.data.prepared.shards import IMAGES_OF

    path = folder / shard_name(number)
    if not path.is_file():  # nothing was set aside
        return
    rows: dict[str, dict[str, Any]] = {}
    images: dict[str, dict[int, bytes]] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            file = tar.extractfile(member)
            assert file is not None
            key, _, extension = member.name.partition(".")
            if extension == "json":
                rows[key] = json.loads(file.read())
            else:
                images.setdefault(key, {})[int(extension.partition(".")[0])] = file.read()
    for key, row in rows.items():
        own = images.get(row.pop(IMAGES_OF, key), {})
        yield key, row, [own[i] for i in range(len(own))]


def _write(
    directory: Path, first: int, samples: Sequence[Stored], schema: str, count: Count
) -> None:
    from casa_train.data.prepared.shard_writer import Shard

    for number in range(_shards(len(samples))):
        shard = Shard(directory, first + number, schema, count)
        for key, row, images in samples[number * SHARD :][:SHARD]:
            shard.write(key, row, images)
        shard.finish({"unit": f"set aside, {number}", "rows": 0})


def _shards(samples: int) -> int:
    return -(-samples // SHARD)


def _candidates_path(folder: Path, number: int) -> Path:
    return folder / f"candidates-{number:06d}.json"


def _trained_path(folder: Path, number: int) -> Path:
    return folder / f"trained-{number:06d}.npy"
