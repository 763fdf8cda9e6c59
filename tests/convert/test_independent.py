"""`--verify` against a model that shares no code with this project: tests/helpers/naive_casa.py."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

from casa_train.convert.__main__ import main
from casa_train.io.files import EXPORT_MARKER
from tests.helpers import naive_casa
from tests.helpers.foreign import convert_command
from tests.helpers.naive_checkpoint import write_naive

VERIFY = ["--verify", "--trust-remote-code"]
CASA = ["--fusion", "mechanism=casa"]
Capture = pytest.CaptureFixture[str]
# Two float32 programs that add in another order. `--verify` itself allows 1e-4.
ROUNDING = 5e-6


def test_it_is_independent() -> None:
    tree = ast.parse(Path(naive_casa.__file__).read_text())
    imported = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    imported |= {str(n.module) for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert {name.split(".")[0] for name in imported} <= {
        *("__future__", "json", "math", "pathlib", "types", "typing"),
        *("torch", "transformers", "safetensors"),
    }


@pytest.mark.parametrize(
    ("decoder", "text_keys", "shared", "tower"),
    [
        ("llama", False, False, "visual"),
        ("llama", False, True, "visual"),
        ("llama", True, False, "enc"),
        ("llama", True, True, "visual"),
        # Helium's names and sizes are Llama's, but it rotates other pairs.
        ("helium", True, False, "visual"),
        ("qwen2_5_vl_text", False, False, "visual"),
        ("qwen2_5_vl_text", False, True, "enc"),
        ("qwen2_5_vl_text", True, False, "visual"),
        ("qwen2_5_vl_text", True, True, "visual"),
    ],
)
def test_the_equations_of_the_paper_give_the_same(
    decoder: str, text_keys: bool, shared: bool, tower: str, tmp_path: Path, capsys: Capture
) -> None:
    source = write_naive(tmp_path / f"of_{tmp_path.name}", decoder, text_keys, shared, tower)
    out = tmp_path / "out"
    words = convert_command(source, out, *VERIFY, *(CASA if text_keys else []))
    code = main(words)
    told = capsys.readouterr()
    assert code == 0, told.out + told.err
    assert "vision tower" in told.out and "no such module" not in told.out
    record = json.loads((out / EXPORT_MARKER).read_text())
    assert 0 < record["verified"]["worst"] < ROUNDING


def test_the_other_mechanism_is_found_at_the_first_layer(tmp_path: Path, capsys: Capture) -> None:
    for number, (text_keys, words) in enumerate(((True, []), (False, CASA))):
        source = write_naive(tmp_path / f"of_{tmp_path.name}_{number}", text_keys=text_keys)
        assert main(convert_command(source, tmp_path / f"out{number}", *VERIFY, *words)) == 1
        assert "the first difference is in layer 0." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changed", "first"),
    [
        ("image_prefix.visual.blocks.2.attn.proj.weight", "vision tower"),
        ("model.layers.1.casa_attn.norm.weight", "layer 1"),
        ("model.layers.2.casa_attn.v_proj.weight", "layer 2"),
        ("model.layers.0.self_attn.k_proj.weight", "layer 0"),
        ("model.norm.weight", "logits"),
    ],
)
def test_a_change_is_found_where_it_is(
    changed: str, first: str, tmp_path: Path, capsys: Capture
) -> None:
    source = write_naive(
        tmp_path / f"of_{tmp_path.name}", "qwen2_5_vl_text", text_keys=True, change={changed: 1.02}
    )
    assert main(convert_command(source, tmp_path / "out", *VERIFY, *CASA)) == 1
    printed = capsys.readouterr().out
    assert f"the first difference is in {first}." in printed, printed
    rows = re.findall(r"^(vision tower|layer \d|logits) .*$", printed, re.MULTILINE)
    assert rows == ["vision tower", "layer 0", "layer 1", "layer 2", "logits"]


@pytest.mark.parametrize(
    ("most", "row"),
    [
        ("56 * 56", "large image +56x84 +<- differs: 28x56 there"),
        ("112 * 112", "large image +56x84 +<- differs: 84x112 there"),
        ("9999 * 9999", r"large image \(no limit there\) +56x84 *"),
    ],
)
def test_another_image_size_is_found(most: str, row: str, tmp_path: Path, capsys: Capture) -> None:
    """Of the original, or of the export: whichever takes larger images."""
    source = write_naive(tmp_path / f"of_{tmp_path.name}")
    file = source / "naive_casa.py"
    file.write_text(file.read_text().replace("most = 84 * 84", f"most = {most}"))
    # An original without any limit is no reason not to trust the weights.
    assert main(convert_command(source, tmp_path / "out", *VERIFY)) == (
        0 if "no limit" in row else 1
    )
    printed = capsys.readouterr().out
    assert re.search(f"^{row}$", printed, re.MULTILINE), printed
    assert ("the first difference is in large image." in printed) == ("differs" in row)
    if most != "56 * 56":  # the conversation's images are resized by neither
        assert re.search(r"^logits +[\d,]+ +\d\.\de-07 *$", printed, re.MULTILINE)


def test_a_processor_that_fails_is_told(tmp_path: Path, capsys: Capture) -> None:
    source = write_naive(tmp_path / f"of_{tmp_path.name}")
    file = source / "naive_casa.py"
    file.write_text(file.read_text().replace("        images, points = [], []", "        1 / 0"))
    assert main(convert_command(source, tmp_path / "out", *VERIFY)) == 2
    error = capsys.readouterr().err
    assert "the code of its processor fails" in error and "ZeroDivisionError" in error


def test_rows_and_columns_are_told_apart(tmp_path: Path, capsys: Capture) -> None:
    """Multimodal RoPE with its last two axes exchanged."""
    source = write_naive(tmp_path / f"of_{tmp_path.name}", "qwen2_5_vl_text", text_keys=True)
    file = source / "naive_casa.py"
    right = "(start, start + row, start + column)"
    assert right in file.read_text()
    wrong = file.read_text().replace(right, "(start, start + column, start + row)")
    file.write_text(wrong)
    assert main(convert_command(source, tmp_path / "out", *VERIFY, *CASA)) == 1
    assert "the first difference is in layer 0." in capsys.readouterr().out
