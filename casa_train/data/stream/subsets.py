"""Which files a published dataset's subsets have: asked of its directory or the hub."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from casa_train.config.data_schema import StreamDatasetConfig
from casa_train.data.stream.row_groups import Retries, list_files
from casa_train.data.stream.stream_source import (
    StreamSource,
)
from casa_train.errors import UserError


def is_local(source: str) -> bool:
    """Whether a source is a directory here; otherwise it is a repository of the hub.

    :raises UserError: what can only be a directory and is none.
    """
    if os.path.isdir(os.path.expanduser(source)):
        return True
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) and not source.startswith((".", "/", "~")):
        return False
    raise UserError(
        f"data.stream.datasets has the source {source!r}, which is no directory; expected a local "
        "copy of a dataset or a hub id such as HuggingFaceM4/FineVision. Mend the path."
    )


def subset_names(source: str, revision: str | None, retries: Retries) -> list[str]:
    """The subsets (configurations) of a dataset, on the hub or in a local directory.

    :raises UserError: a dataset that cannot be reached or read.
    """
    import datasets  # takes seconds, and only streams need it

    def work() -> list[str]:
        place = os.path.expanduser(source)
        return list(
            card_of(place) if is_local(source) else ()
        ) or datasets.get_dataset_config_names(place, revision=revision)

    return retries.run(_named(source), work)


def copied_subsets(source: str, subsets: Sequence[str], retries: Retries) -> list[str]:
    """Those of the subsets of which a local directory holds files: it may be a partial copy."""

    def work() -> list[str]:
        place = os.path.expanduser(source)
        card = card_of(place)
        return [s for s in subsets if s not in card or _files_of(place, card[s])]

    return retries.run(_named(source), work)


def card_of(directory: str) -> dict[str, Any]:
    """By subset what the card of a local copy says of its files; nothing without a card."""
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCard

    path = os.path.join(directory, "README.md")
    if not os.path.isfile(path):
        return {}
    return dict(MetadataConfigs.from_dataset_card_data(DatasetCard.load(path).data))


def _files_of(directory: str, described: Mapping[str, Any]) -> dict[str, list[str]]:
    """By split the files that are there of a subset, whatever else of the dataset is.

    The library asks for files of the first subset, too, which a partial copy may lack.
    """
    from datasets.data_files import DataFilesDict, sanitize_patterns

    base = os.path.join(os.path.abspath(directory), described.get("data_dir") or "")
    patterns = sanitize_patterns(described.get("data_files") or "**/*.parquet")
    found: dict[str, list[str]] = {}
    for split, names in patterns.items():
        with contextlib.suppress(FileNotFoundError):
            files = DataFilesDict.from_patterns({split: names}, base_path=base)
            found |= {name: list(there) for name, there in files.items() if there}
    return found


def _named(source: str) -> str:
    """A dataset as messages call it."""
    if is_local(source):
        return f"dataset {source}"
    return f"dataset {source} of the hub (there is no directory of that name)"


def open_subset(
    dataset: StreamDatasetConfig, subset: str, retries: Retries | None = None
) -> StreamSource:
    """Lists the parquet files of one subset and their row groups.

    :param retries: None: what fails is not tried again.
    :raises UserError: an unknown subset or split, files of another format, no rows.
    """
    import datasets

    retries = retries or Retries(1, 0)
    source, split = dataset.source, dataset.split

    def work() -> Any:
        place = os.path.expanduser(source)
        card = card_of(place) if is_local(source) else {}
        if subset in card:
            return _files_of(place, card[subset])
        try:
            builder = datasets.load_dataset_builder(place, subset, revision=dataset.revision)
        except ValueError as error:  # an unknown subset; the message lists the known ones
            raise UserError(
                f"dataset {source} has no subset {subset!r} ({error}). Mend data.stream.datasets."
            ) from error
        return builder.config.data_files

    found_files = retries.run(f"subset {subset} of {_named(source)}", work)
    files = found_files or {}
    if split not in files:
        raise UserError(
            f"subset {subset} of dataset {source} has the splits {sorted(files)}; expected "
            f"{split!r}. Set data.stream.datasets.NAME.split to one of them."
        )
    urls = sorted(map(str, files[split]))
    others = [url for url in urls if not url.endswith(".parquet")]
    if others:
        raise UserError(
            f"subset {subset} of dataset {source} holds {others[0]}; a stream reads parquet files "
            "only. Prepare this dataset with python -m data_recipes, or leave the subset out."
        )
    found = StreamSource(
        dataset.schema,
        subset,
        tuple(list_files(urls, retries)),
        dataset.repeats.get(subset, 1),
    )
    if not found.rows:
        raise UserError(
            f"subset {subset} of dataset {source} has no rows; leave it out of "
            "data.stream.datasets."
        )
    return found
