"""`--verify` runs the original's own code beside the export: it finds what differs, and where."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from casa_train.convert.__main__ import main
from casa_train.convert.original import OURS, listening
from casa_train.io.files import EXPORT_MARKER
from tests.helpers.foreign import convert_command, foreign_model, renamed, write_foreign

ENC = "image_prefix.enc.visual"
VERIFY = ["--verify", "--trust-remote-code"]
Capture = pytest.CaptureFixture[str]


@pytest.mark.parametrize(
    ("mechanism", "backbone", "model_type"),
    [
        ("cross_attention", "llama", "CASA_Helium1_VL_2B"),
        ("insertion", "llama", "Helium1_VL_2B"),
        ("cross_attention", "qwen2_5_vl", "CASA_Qwen2_5_VL_3B"),
    ],
)
def test_what_equals_is_noted(
    mechanism: str, backbone: str, model_type: str, tmp_path: Path, capsys: Capture
) -> None:
    model = foreign_model(mechanism, backbone)
    source = write_foreign(
        tmp_path / f"of_{tmp_path.name}", model, renamed(ENC), model_type, tower=ENC
    )
    out = tmp_path / "out"
    assert main(convert_command(source, out, *VERIFY)) == 0, capsys.readouterr()
    printed = capsys.readouterr().out
    assert re.search(r"^logits +[\d,]+ +0\.0e\+00$", printed, re.MULTILINE)
    assert "vision tower" in printed and "no such module" not in printed
    record = json.loads((out / EXPORT_MARKER).read_text())
    assert record["verified"]["source_digest"] == record["source_digest"]
    assert record["verified"]["precision"] == "fp32" and record["verified"]["worst"] == 0
    card = (out / "README.md").read_text()
    assert "Verified: its logits equal" in card and "Not verified" not in card
    # An export that is there is compared alone.
    assert main(convert_command(source, out, *VERIFY)) == 0
    assert "compared alone" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("twist", "first"),
    [
        ("inner.model.layers[1].fusion.o_proj.weight.data.mul_(1.01)", "layer 1"),
        ("inner.model.layers[0].mlp.up_proj.weight.data.mul_(1.01)", "layer 0"),
        ("inner.visual.merger.ln_q.weight.data.mul_(1.01)", "vision tower"),
        ("inner.lm_head.weight.data.mul_(1.01)", "logits"),
    ],
)
def test_where_the_original_differs_is_found(
    twist: str, first: str, tmp_path: Path, capsys: Capture
) -> None:
    source = write_foreign(
        tmp_path / f"of_{tmp_path.name}", foreign_model(), renamed(), twist=twist
    )
    out = tmp_path / "out"
    assert main(convert_command(source, out, *VERIFY)) == 1
    printed = capsys.readouterr().out
    assert f"the first difference is in {first}." in printed
    rows = {line.split("  ")[0]: line for line in printed.splitlines() if "e-" in line}
    assert "<- differs" in rows["logits"] and "<- differs" in rows[first]
    if first == "layer 1":
        assert re.search(r"^layer 0 +[\d,]+ +0\.0e\+00$", printed, re.MULTILINE)
    assert json.loads((out / EXPORT_MARKER).read_text())["verified"] is None
    assert "Not verified" in (out / "README.md").read_text()


def test_another_mechanism_is_found_at_the_first_layer(tmp_path: Path, capsys: Capture) -> None:
    """The same tensors, read as CASA and as plain cross-attention."""
    source = write_foreign(tmp_path / f"of_{tmp_path.name}", foreign_model("casa"), renamed())
    assert main(convert_command(source, tmp_path / "out", *VERIFY)) == 1
    assert "the first difference is in layer 0." in capsys.readouterr().out
    right = convert_command(source, tmp_path / "right", *VERIFY, "--fusion", "mechanism=casa")
    assert main(right) == 0


def test_another_template_is_told_apart_from_another_model(tmp_path: Path, capsys: Capture) -> None:
    source = write_foreign(tmp_path / f"of_{tmp_path.name}", foreign_model(), renamed())
    words = convert_command(source, tmp_path / "out", *VERIFY)
    file = Path(words[words.index("--template") + 1])
    file.write_text(file.read_text().replace("Answer briefly.", "Answer at length."))
    assert main(words) == 1
    printed = capsys.readouterr().out
    assert "the first difference is in token ids." in printed
    assert re.search(r"^logits +[\d,]+ +0\.0e\+00$", printed, re.MULTILINE)


def test_another_image_size_shows_in_a_large_image(tmp_path: Path, capsys: Capture) -> None:
    source = write_foreign(tmp_path / f"of_{tmp_path.name}", foreign_model(), renamed())
    words = convert_command(source, tmp_path / "out", *VERIFY)
    words[words.index("--image-size") + 1] = "112"
    assert main(words) == 1
    assert "the first difference is in large image." in capsys.readouterr().out


def test_a_tower_that_runs_once_an_image_is_heard_whole() -> None:
    model = foreign_model()
    picture = torch.full((3, 56, 84), 40, dtype=torch.uint8)
    with listening(model, OURS) as heard:
        parts = [model.visual([picture]), model.visual([picture + 90, picture])]
    assert torch.equal(heard["vision tower"], torch.cat(parts)) and len(parts[1]) == 12
    assert not torch.equal(parts[0], parts[1][:6])
    model.visual([picture])  # nobody listens any more
    assert len(heard["vision tower"]) == 18


def test_no_code_runs_unasked(tmp_path: Path, capsys: Capture) -> None:
    trace = tmp_path / "trace"
    source = write_foreign(tmp_path / f"of_{tmp_path.name}", foreign_model(), renamed())
    for file in source.glob("*.py"):
        file.write_text(f"open({str(trace)!r}, 'w').write('ran')\n" + file.read_text())
    assert main(convert_command(source, tmp_path / "out")) == 0
    assert main(convert_command(source, tmp_path / "out", "--verify")) == 2
    assert "--trust-remote-code" in capsys.readouterr().err
    assert not trace.exists()
    assert main(convert_command(source, tmp_path / "out", *VERIFY)) == 0
    assert trace.read_text() == "ran"


def test_another_source_and_code_that_fails(tmp_path: Path, capsys: Capture) -> None:
    source = write_foreign(tmp_path / f"of_{tmp_path.name}", foreign_model(), renamed())
    other = write_foreign(tmp_path / "other", foreign_model(seed=5), renamed())
    out = tmp_path / "out"
    assert main(convert_command(source, out)) == 0
    assert main(convert_command(other, out, *VERIFY)) == 2
    assert "expected the same files" in capsys.readouterr().err
    marker = json.loads((out / EXPORT_MARKER).read_text())
    shutil.copytree(out, tmp_path / "exported")
    del marker["source_digest"]
    (tmp_path / "exported" / EXPORT_MARKER).write_text(json.dumps(marker))
    assert main(convert_command(source, tmp_path / "exported", *VERIFY)) == 2
    assert "is no converted export" in capsys.readouterr().err
    broken = write_foreign(tmp_path / "broken", foreign_model(), renamed(), twist="inner.nothing")
    assert main(convert_command(broken, tmp_path / "third", *VERIFY)) == 2
    error = capsys.readouterr().err
    assert "its own code does not load (AttributeError" in error and "Traceback" not in error


def test_an_export_that_is_there_takes_no_other_choices(tmp_path: Path, capsys: Capture) -> None:
    """Repeated with what the message advises, the command would compare the same export again."""
    source = write_foreign(tmp_path / f"of_{tmp_path.name}", foreign_model("casa"), renamed())
    out = tmp_path / "out"
    assert main(convert_command(source, out, *VERIFY)) == 1
    assert "to another --out" in capsys.readouterr().out
    assert main(convert_command(source, out, *VERIFY, "--fusion", "mechanism=casa")) == 2
    error = capsys.readouterr().err
    assert "fusion {'mechanism': 'casa'} (it has None)" in error and "another --out" in error
    rules = tmp_path / "rules.yaml"
    rules.write_text("extends: kyutai\nname: mine\n")
    assert main(convert_command(source, out, *VERIFY, "--rules", str(rules))) == 2
    assert "the rules 'mine' (it has 'kyutai'" in capsys.readouterr().err
    # Given none, it is compared as it is.
    assert main(["kyutai", str(source), "--out", str(out), *VERIFY]) == 1


def test_a_bad_device_is_told_before_anything_is_written(tmp_path: Path, capsys: Capture) -> None:
    source = write_foreign(tmp_path / f"of_{tmp_path.name}", foreign_model(), renamed())
    out = tmp_path / "out"
    assert main(convert_command(source, out, *VERIFY, "--device", "gpu")) == 2
    assert "--device is 'gpu', which cannot be used here" in capsys.readouterr().err
    assert not out.exists()
    for words in (["--device", "cpu"], ["--precision", "bf16"], ["--attention", "sdpa"]):
        assert main(convert_command(source, out, *words)) == 2
        assert f"{words[0]} says nothing without --verify" in capsys.readouterr().err
    assert not out.exists()
