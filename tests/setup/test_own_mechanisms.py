"""A fusion mechanism that the project does not know: one Python file and one YAML of the user's."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from casa_train.checkpoint.slices import read_weights
from casa_train.cost.sizes import text_sizes, vision_sizes
from casa_train.cost.work import count_operations
from casa_train.data.processor import build_processor
from casa_train.errors import UserError
from casa_train.export.from_run import find_checkpoint
from casa_train.io.environment import MECHANISMS_VARIABLE
from casa_train.modeling.block_work import Pairs
from casa_train.modeling.fusion import MECHANISMS, FusionMechanism, register
from casa_train.run.configuration import load_model_config, load_run_config
from casa_train.run.layout import PROCESSOR
from casa_train.setup.model import build_model
from casa_train.setup.own_mechanisms import register_own
from tests.helpers.commands import ROOT, TINY, environment, on_data, train_command
from tests.helpers.fork_server import FORK_ALL
from tests.helpers.tiny import Layout, fill, packed_inputs, tiny_model
from tests.helpers.toy_mechanism import FILE, write_toy

# What whoever has the export alone runs: without the project, and without the variable.
STRANGER = """
import sys
sys.modules["casa_train"] = None
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoProcessor
path, out = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(path, trust_remote_code=True).float().eval()
processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
image = {"type": "image", "image": Image.new("RGB", (56, 56), "crimson")}
words = {"type": "text", "text": "what colour?"}
batch = processor.tokenize_messages([{"role": "user", "content": [image, words]}])
with torch.no_grad():
    save_file({"ids": batch["input_ids"], "logits": model(**batch).logits}, out)
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file of a mechanism that this process knows for the time of a test."""
    file, _ = write_toy(tmp_path / "mine")
    monkeypatch.setenv(MECHANISMS_VARIABLE, str(file))
    known = dict(MECHANISMS)
    yield file
    MECHANISMS.clear()
    MECHANISMS.update(known)
    sys.modules.pop("casa_train.modeling.toy", None)


def command(
    arguments: list[str], own: Path | None, code: int = 0, folder: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    env = {**environment(), FORK_ALL: "1"}
    env.pop(MECHANISMS_VARIABLE, None)
    if own is not None:
        env[MECHANISMS_VARIABLE] = str(own)
    done = subprocess.run(
        arguments, cwd=folder, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-4000:]
    return done


@pytest.mark.slow
def test_a_toy_mechanism_is_one_file_and_one_yaml(
    data_dir: Path, tmp_path: Path, toy: Path
) -> None:
    run, config_dir = tmp_path / "run", ["--config-dir", str(toy.parent / "conf")]
    start = ["+experiment=demo", "fusion=toy", *TINY, *on_data(data_dir), f"run_dir={run}"]
    start += ["data.workers=1", "trainer.steps=1", "checkpoint.every=1"]

    # What it would cost.
    printed = command(train_command([*config_dir, *start, "dry_run=true"]), toy).stdout
    assert "fusion     toy in 1 of 2 blocks: every=2, strength=0.5" in printed
    for line in ("fusion, estimate", "fusion, image projections", "fusion, attention"):
        assert line in printed, printed

    # Two ranks with a loader process each, and an export in the background.
    command(train_command([*config_dir, *start, "export.every=1"], processes=2), toy)
    export = run / "exports" / "step_1"
    assert (export / "toy.py").read_text() == FILE

    # In other hands: a fresh process, with the export alone.
    answer = tmp_path / "answer.safetensors"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    command([sys.executable, "-c", STRANGER, str(export), str(answer)], None, folder=elsewhere)
    theirs = load_file(answer)
    config = load_run_config(run)
    processor = build_processor(config, run / PROCESSOR)
    model = build_model(config, processor, load_model_config(run))
    model.load_state_dict(read_weights(find_checkpoint(run, None).path), assign=True, strict=False)
    model.tie_weights()
    model.eval()
    image = {"type": "image", "image": Image.new("RGB", (56, 56), "crimson")}
    content = [image, {"type": "text", "text": "what colour?"}]
    batch = processor.tokenize_messages([{"role": "user", "content": content}])
    assert torch.equal(batch["input_ids"], theirs["ids"])
    with torch.no_grad():
        (points,) = batch["image_embeds_insertion_points"]
        packed = model.pack(batch["input_ids"][0], points, batch["pixel_values"])
        logits = model(packed=packed).logits
        blind = model(input_ids=batch["input_ids"]).logits[0]
    torch.testing.assert_close(theirs["logits"][0], logits, rtol=0, atol=1e-5)
    assert (blind - logits).abs().max() > 1e-4

    # Whoever does not name the file has no such mechanism, wherever the file lies.
    shutil.copy(toy, run / "toy.py")
    write = [sys.executable, "-m", "casa_train.export", str(run), "--out", str(tmp_path / "again")]
    message = command(write, None, code=2, folder=run).stderr
    for word in ("'toy' is unknown", "'casa'", "'insertion'", MECHANISMS_VARIABLE):
        assert word in message, message
    command(write, toy)


def test_its_work_is_what_torch_counts(toy: Path) -> None:
    register_own()
    model = tiny_model("toy", every=2, strength=0.5)
    pack = [Layout(14, (2, 8), ((8, 8), (8, 8)))] * 2  # equal windows, so that nothing is padded
    chunks = [layout.chunk() for layout in pack]
    plan = model.mechanism.plan(chunks, None, None, torch.device("cpu"))
    assert plan.cross is not None
    dense = [
        sum(len(q) * len(k) for q, k in zip(s.query_rows, s.key_rows, strict=True))
        for s in (plan.self_attention, plan.cross)
    ]
    parts = count_operations(
        text_sizes(model.config.text_config, True),
        vision_sizes(model.config, -1),
        model.mechanism,
        chunks,
        answers=28,
        pairs=Pairs(*dense),
    )
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
        model(packed=packed_inputs(fill(pack))).logits.sum().backward()
    assert sum(part.total for part in parts.values()) == counted.get_total_flops()


def test_what_cannot_be_counted_is_refused() -> None:
    with pytest.raises(TypeError, match="'lazy' has a run_layer of its own but no count_layer"):

        @register
        class Lazy(FusionMechanism):
            name = "lazy"

            def run_layer(self, *arguments: object) -> object:  # type: ignore[override]
                return arguments

    with pytest.raises(TypeError, match="'casa' of .*: casa_train.modeling.casa has registered"):

        @register
        class Other(FusionMechanism):
            name = "casa"

    with pytest.raises(TypeError, match="Nameless.*expected a class variable `name`"):

        @register
        class Nameless(MECHANISMS["casa"]):  # type: ignore[misc]
            pass

    assert "lazy" not in MECHANISMS and MECHANISMS["casa"].__name__ == "Casa"


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("absent.py", None, ["no Python file"]),
        ("toy.txt", FILE, ["no Python file"]),
        ("my-toy.py", FILE, ["Rename it"]),
        ("casa.py", FILE, ["Rename it"]),
        ("empty.py", "", ["registers no fusion mechanism", "@register"]),
        ("far.py", "from casa_train.modeling.fusion import register", ["line 1", "relative"]),
        ("far.py", "import casa_train.modeling", ["line 1", "relative"]),
        ("near.py", "from .toy_layers import ToyLayer", [".toy_layers", "one file"]),
    ],
)
def test_a_file_that_no_export_could_take_is_refused(
    toy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    text: str | None,
    words: list[str],
) -> None:
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    monkeypatch.setenv(MECHANISMS_VARIABLE, os.pathsep.join([str(toy), str(path)]))
    with pytest.raises(UserError) as caught:
        register_own()
    assert all(word in str(caught.value) for word in [str(path), *words])
    assert path.stem in ("casa", "toy") or f"casa_train.modeling.{path.stem}" not in sys.modules
