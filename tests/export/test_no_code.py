"""Nothing that lies in a run directory, an export or prepared data runs code when it is read.

Every file there is replaced, one after the other, by what would leave a trace if a reader trusted
it: pickles in the forms that torch, numpy and Python read, and YAML that makes Python objects. (The
Python files of an export are run by design, where they are marked as this project's;
`test_remote_code.py` has that.)
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import pickle
import shutil
import stat
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from casa_train.checkpoint.frozen import FROZEN_DIRECTORY, FrozenFile, write_frozen
from casa_train.checkpoint.manager import CheckpointManager
from casa_train.checkpoint.slices import (
    MASTER,
    STATE_DIRECTORY,
    Slice,
    read_weights,
    write_slices,
)
from casa_train.config.compose import compose_config, to_config
from casa_train.config.schema import CheckpointConfig, Config
from casa_train.data.prepared.shard_index import INDEX_FILE, open_index
from casa_train.data.prepared.shards import META_FILE, Split
from casa_train.data.processor import build_processor
from casa_train.data.tokens import load_tokenizer
from casa_train.distributed.random_state import load_rng_state, rng_state, set_rng_state
from casa_train.distributed.ranks import Ranks
from casa_train.errors import UserError
from casa_train.export.from_run import find_checkpoint
from casa_train.export.loading import load_model, load_processor
from casa_train.export.writer import exported_step
from casa_train.inspect.pages import find_target
from casa_train.io.files import EXPORT_MARKER, sha256
from casa_train.io.tensors import save_tensors
from casa_train.metrics.sinks.jsonl import read_metrics
from casa_train.modeling.image_processing_casa import ImageError, read_header
from casa_train.pages import pictures
from casa_train.report import run_page
from casa_train.report.jobs import read_sweep
from casa_train.report.run_report import report
from casa_train.run import configuration
from casa_train.run.configuration import check_same_run, load_model_config, load_run_config
from casa_train.run.directory import prepare_run_directory, record_run
from casa_train.run.layout import METRICS_FILE, STARTS_FILE
from casa_train.run.starts import StartLog, read_starts
from casa_train.setup.model import build_model, build_model_config
from casa_train.setup.pretrained import Pretrained
from casa_train.setup.weights import open_sources
from casa_train.training.state import Progress
from tests.helpers.commands import TINY, on_data
from tests.helpers.tiny_export import write_tiny_export


class Bomb:
    """Makes a directory when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.makedirs, (str(self.trace), 0o777, True)


def torch_file(trace: Path) -> bytes:
    file = io.BytesIO()
    torch.save({"updates": 1, "slices": [Bomb(trace)], "python": Bomb(trace)}, file)
    return file.getvalue()


def numpy_file(trace: Path) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([Bomb(trace)], dtype=object), allow_pickle=True)
    return file.getvalue()


def yaml_file(trace: Path) -> bytes:
    return f"name: !!python/object/apply:os.makedirs [{json.dumps(str(trace))}, 511, true]".encode()


# What is planted, and the careless reader that it waits for.
BOMBS: dict[str, tuple[Callable[[Path], bytes], Callable[[bytes], Any]]] = {
    "pickle": (lambda trace: pickle.dumps(Bomb(trace)), pickle.loads),
    "torch": (torch_file, lambda b: torch.load(io.BytesIO(b), weights_only=False)),
    "numpy": (numpy_file, lambda b: np.load(io.BytesIO(b), allow_pickle=True)),
    "yaml": (yaml_file, yaml.unsafe_load),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_the_traces_are_left_by_careless_readers(tmp_path: Path, bomb: str) -> None:
    make, read = BOMBS[bomb]
    read(make(tmp_path / "ran"))
    assert (tmp_path / "ran").is_dir()


@pytest.fixture(scope="module")
def run(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with a checkpoint, as a training leaves it."""
    path = tmp_path_factory.mktemp("runs") / "run"
    frozen = ["model.backbone.trainable=false", f"run_dir={path}"]
    config = compose_config(["+experiment=demo", *TINY, *on_data(data_dir), *frozen])
    processor = build_processor(config)
    model = build_model(
        config, processor, build_model_config(config, processor, open_sources(config))
    )
    prepare_run_directory(path, config)
    record_run(path, config, model.config.to_json_string())
    counts = ("answer_tokens", "text_tokens", "image_tokens", "samples", "bad_samples")
    times = ("seconds", "data_seconds", "text_tokens_per_second", "image_tokens_per_second")
    record = {"step": 1, "loss": 2.0, "gradient_norm": 1.0, "rates": {"fusion": 1e-4}}
    record |= {**dict.fromkeys(counts, 3), **dict.fromkeys(times, 0.5)}
    record |= {"samples_digest": "0", "fill_text": 0.9, "fill_image": 0.7}
    (path / METRICS_FILE).write_text(json.dumps(record) + "\n")
    (path / "validation.jsonl").write_text("")
    log = StartLog(path / STARTS_FILE, {"ranks": 1})
    log.begin(Progress())
    log.close(None)
    checkpoints = path / "checkpoints"

    def write(target: Path) -> FrozenFile:
        values = {n: torch.rand(p.shape) for n, p in model.named_parameters()}
        trains = {name: p.requires_grad for name, p in model.named_parameters()}
        still = {name: value for name, value in values.items() if not trains[name]}
        kinds = {name: (value.dtype, tuple(value.shape)) for name, value in still.items()}
        stored = write_frozen(checkpoints, kinds, still.values())
        slices = [
            Slice(name, tuple(value.shape), 0, {MASTER: value.view(-1)})
            for name, value in values.items()
            if trains[name]
        ]
        write_slices(target / STATE_DIRECTORY, 0, slices, 1, stored)
        return stored

    CheckpointManager(checkpoints, CheckpointConfig(), {}, Ranks()).save(1, write, {"progress": {}})
    return path


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_export(tmp_path_factory.mktemp("exports") / "tiny")


def files_of(directory: Path) -> list[Path]:
    return sorted(p for p in directory.rglob("*") if p.is_file() and p.suffix != ".py")


def planted(source: Path, copy: Path, name: str, content: bytes) -> None:
    """A fresh copy of a directory with a file replaced, in a checkpoint its manifest, too."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(source, copy)
    path = copy / name
    path.write_bytes(content)
    manifest = copy / "checkpoints" / "step_1" / "manifest.json"
    if path.parent == copy or not manifest.is_file() or path == manifest:
        return
    fields = json.loads(manifest.read_text())
    entry = {"bytes": len(content), "sha256": sha256(path)}
    if path.parent.name == FROZEN_DIRECTORY:
        fields["frozen"] = entry
        path.rename(path.with_name(f"{entry['sha256']}.safetensors"))
    else:
        fields["files"][str(path.relative_to(manifest.parent))] = entry
    manifest.write_text(json.dumps(fields))


def read_all(readers: dict[str, Callable[[], Any]]) -> set[str]:
    """Calls each; returns which could read what they found, whatever the others raised."""
    well = set()
    for name, read in readers.items():
        with contextlib.suppress(Exception):
            read()
            well.add(name)
    return well


def run_readers(run: Path) -> dict[str, Callable[[], Any]]:
    checkpoint = run / "checkpoints" / "step_1"

    def resume() -> None:
        found = CheckpointManager(checkpoint.parent, CheckpointConfig(), {}, Ranks()).latest()
        assert found is not None

    def whole_config() -> None:
        check_same_run(run / "config.yaml", load_run_config(run))

    return {
        "configuration": whole_config,
        "model configuration": lambda: load_model_config(run),
        "random state": lambda: set_rng_state(load_rng_state(checkpoint / "rng_0.pt")),
        "weights": lambda: read_weights(checkpoint),
        "export and evaluate": lambda: find_checkpoint(run, None),
        "inspect": lambda: find_target(str(run), None, []),
        "metrics": lambda: read_metrics(run / METRICS_FILE),
        "validations": lambda: read_metrics(run / "validation.jsonl"),
        "starts": lambda: read_starts(run / STARTS_FILE),
        "sweep": lambda: read_sweep(run.parent),
        "background exports": lambda: exported_step(run),
        "report": lambda: report(run),
        "resume": resume,
    }


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without what takes most of the time and opens no file: charts, and checks of one and the same
    configuration by each of its readers.
    """
    monkeypatch.setattr(run_page, "draw_plots", lambda metrics: "")
    checked: dict[str, Config] = {}

    def check(raw: DictConfig) -> Config:
        text = OmegaConf.to_yaml(raw)
        if text not in checked:
            checked[text] = to_config(raw)
        return copy.deepcopy(checked[text])

    monkeypatch.setattr(configuration, "to_config", check)


@pytest.mark.slow
@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize("bomb", BOMBS)
def test_no_file_of_a_run_is_trusted(run: Path, tmp_path: Path, bomb: str) -> None:
    copy, trace = tmp_path / "runs" / "run", tmp_path / "ran"
    readers = run_readers(copy)
    report_of = {"report": readers.pop("report")}
    shutil.copytree(run, copy)
    assert read_all(readers) == readers.keys()
    assert read_all(report_of)
    names = [str(path.relative_to(run)) for path in files_of(run)]
    assert {"config.yaml", "checkpoints/step_1/rng_0.pt"} <= set(names)
    later = ["evaluation.json", "quarantine_0.jsonl", "requeue.json", "failure.txt"]
    for name in (*names, *later, EXPORT_MARKER):
        planted(run, copy, name, BOMBS[bomb][0](trace))
        read_all(readers)
        if "/" not in name:
            read_all(report_of)
        assert not trace.exists(), name


def test_what_is_no_file_of_tensors_is_named(tmp_path: Path) -> None:
    for name, (make, _) in BOMBS.items():
        path = tmp_path / f"{name}.pt"
        path.write_bytes(make(tmp_path / "ran"))
        with pytest.raises(UserError, match=f"{path} cannot be read .*expected a file of tensors"):
            load_rng_state(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("bomb", BOMBS)
def test_no_file_of_an_export_is_trusted(export: Path, tmp_path: Path, bomb: str) -> None:
    copy, trace = tmp_path / "export", tmp_path / "ran"
    shutil.copytree(export, copy)

    def warm_start() -> None:
        opened = Pretrained(str(copy), "model.init_from")
        assert opened.shapes() and opened.generation
        opened.tensor(opened.names[0])

    readers: dict[str, Callable[[], Any]] = {
        "tokenizer": lambda: load_tokenizer(str(copy)),
        "processor": lambda: load_processor(copy),
        "model": lambda: load_model(copy, "auto"),
        "warm start": warm_start,
        "background exports": lambda: exported_step(copy),
    }
    assert read_all(readers) >= {"tokenizer", "processor", "model", "warm start"}
    names = [str(path.relative_to(export)) for path in files_of(export)]
    # Weights in an older format: with none beside them, the libraries look for these.
    for name in (*names, "pytorch_model.bin"):
        planted(export, copy, name, BOMBS[bomb][0](trace))
        if name == "pytorch_model.bin":
            (copy / "model.safetensors").unlink()
        read_all(readers)
        assert not trace.exists(), name


@pytest.mark.slow
def test_prepared_data_is_not_trusted(data_dir: Path, tmp_path: Path) -> None:
    copy, trace = tmp_path / "data", tmp_path / "ran"
    shutil.copytree(data_dir, copy)
    directory = copy / "validation"

    def split() -> None:
        opened = Split(directory)
        for row in range(4):
            with contextlib.suppress(Exception):
                opened.read(row)

    readers = {
        "split": split,
        "uncounted": lambda: Split(directory, uncounted=True),
        "tokenizer": lambda: load_tokenizer(str(copy / "tokenizer")),
        "inspect": lambda: find_target(str(directory), None, []),
    }
    assert read_all(readers) == readers.keys()
    kept = [*files_of(data_dir / "validation"), *files_of(data_dir / "tokenizer")]
    for make, _ in BOMBS.values():
        for name in (str(path.relative_to(data_dir)) for path in kept):
            planted(data_dir, copy, name, make(trace))
            read_all(readers)
            assert not trace.exists(), name
    shutil.rmtree(copy)
    shutil.copytree(data_dir, copy)

    # A sample's text and picture, where the index says they lie, and members beside them whose
    # names make webdataset's own decoder unpickle them.
    opened = Split(directory)
    shard = directory / opened.meta["shards"][0]["name"]
    row = opened.index.to_pylist()[0]
    bomb = BOMBS["pickle"][0](trace)
    content = bytearray(shard.read_bytes())
    for offset, size in (
        (row["json_offset"], row["json_size"]),
        *zip(row["image_offsets"], row["image_sizes"], strict=True),
    ):
        assert size > len(bomb)
        content[offset : offset + len(bomb)] = bomb
    shard.write_bytes(content)
    with tarfile.open(shard, "a") as tar:
        for name in (f"{row['key']}.pyd", f"{row['key']}.pickle", f"{row['key']}.pth"):
            info = tarfile.TarInfo(name)
            info.size = len(bomb)
            tar.addfile(info, io.BytesIO(bomb))
    meta = json.loads((directory / META_FILE).read_text())
    meta["shards"][0]["bytes"] = shard.stat().st_size
    # A column of a type that older releases of pyarrow unpickled.
    table = open_index(directory / INDEX_FILE)
    extension = {"ARROW:extension:name": "arrow.py_extension_type"}
    extension["ARROW:extension:metadata"] = bomb  # type: ignore[assignment]
    field = pa.field("key", pa.string(), metadata=extension)
    table = table.set_column(0, field, table.column("key").combine_chunks())
    with pa.OSFile(str(tmp_path / "index"), "wb") as file:
        with pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
    (tmp_path / "index").replace(directory / INDEX_FILE)
    meta["index_sha256"] = sha256(directory / INDEX_FILE)
    (directory / META_FILE).write_text(json.dumps(meta))
    assert "split" in read_all(readers) and not trace.exists()


def test_configurations_may_read_the_environment_and_no_more(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`${oc.env:NAME}` is a value; a `_target_` is a name like any other, and unknown."""
    shutil.copytree(run, tmp_path / "run")
    stored = OmegaConf.load(tmp_path / "run" / "config.yaml")
    monkeypatch.setenv("CASA_TRAIN_TEST", "of the environment")
    stored.name = "${oc.env:CASA_TRAIN_TEST}"
    OmegaConf.save(stored, tmp_path / "run" / "config.yaml")
    assert load_run_config(tmp_path / "run").name == "of the environment"
    target = {"_target_": "os.makedirs", "_args_": [str(tmp_path / "ran")]}
    for place in ("model", "optim", "metrics"):
        changed = OmegaConf.merge(stored, {place: target})
        OmegaConf.save(changed, tmp_path / "run" / "config.yaml")
        with pytest.raises(UserError, match="_target_"):
            load_run_config(tmp_path / "run")
    assert not (tmp_path / "ran").exists()


def test_no_picture_starts_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow hands EPS files to Ghostscript, if there is one."""
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\nmkdir -p '{tmp_path / 'ran'}'\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    data = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    with contextlib.suppress(Exception), Image.open(io.BytesIO(data)) as image:
        image.load()
    assert (tmp_path / "ran").is_dir()  # so much for careless readers
    (tmp_path / "ran").rmdir()
    assert pictures.of_file(data) is None
    with pytest.raises(ImageError):
        read_header(data)
    assert not (tmp_path / "ran").exists()


def test_random_states_of_older_checkpoints_are_read(tmp_path: Path) -> None:
    """They hold an array of numpy's, whose module had another name in numpy 1."""
    np.random.seed(5)
    np.random.standard_normal()
    older = {**rng_state(), "numpy": np.random.get_state()}
    file = io.BytesIO()
    torch.save(older, file)
    set_rng_state(older)
    expected = np.random.standard_normal(3).tolist()
    for number, names in enumerate(
        ((b"numpy._core.", b"numpy.core."), (b"numpy.core.", b"numpy._core."))
    ):
        path = tmp_path / f"{number}.pt"
        path.write_bytes(renamed(file.getvalue(), *names))
        np.random.seed(0)
        set_rng_state(load_rng_state(path))
        assert np.random.standard_normal(3).tolist() == expected
    save_tensors(rng_state(), tmp_path / "now.pt")
    after = np.random.standard_normal(3).tolist()
    with torch.serialization.safe_globals([]):
        state = torch.load(tmp_path / "now.pt", weights_only=True)
    set_rng_state(state)
    assert np.random.standard_normal(3).tolist() == after


def renamed(content: bytes, old: bytes, new: bytes) -> bytes:
    """A file of torch's with a module under another name."""
    import zipfile

    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(out, "w") as target:
        for name in source.namelist():
            data = source.read(name)
            target.writestr(name, data.replace(old, new) if name.endswith("data.pkl") else data)
    return out.getvalue()
