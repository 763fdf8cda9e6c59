"""A tiny world in which the READMEs' commands run as they are written.

It begins as a user begins: `make demo`, then data of one's own. The words of a command are the
README's; what makes it small is added behind them, from `SMALL`. A command that ran once is not run
again for another README.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForCausalLM, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from casa_train.evaluate.benchmarks.question import BENCHMARKS
from casa_train.video.filming import write_film
from data_recipes.synthetic import build_tokenizer
from tests.helpers.benchmark_copies import write_benchmark
from tests.helpers.commands import ROOT, TINY, environment
from tests.helpers.fork_server import FORK_ALL, available, write_python
from tests.helpers.readmes import blocks
from tests.helpers.tiny import HIDDEN, MROPE_SECTION, tiny_text_config, tiny_vision_config
from tests.helpers.tiny_export import write_tiny_export
from tests.helpers.toy_mechanism import write_toy

RUN = [*TINY, "trainer.steps=2", "data.max_pixels=3136"]
OWN_SIZES = [override for override in RUN if ".config." not in override]
BUDGETS = [override for override in RUN if override.startswith("data.")]
VALIDATED = [override for override in RUN if not override.startswith("evaluation.every=")]
# A world is as a user of an installed package has it: commands read the package's conf/, not the
# folder's, which a README's command wrote data/mine.yaml into. "Installed" in conf/README.md says
# that this takes the option that is added here; a checkout's own conf/ does not need it.
OWN_CONF = ["--config-dir", "conf"]
SMALL: list[tuple[str, list[str]]] = [
    ("data_recipes synthetic ", ["--samples", "240", "--validation", "24", "--workers", "1"]),
    ("data_recipes easyvqa", ["--samples", "240", "--validation", "24", "--workers", "1"]),
    ("data_recipes synthetic_clips", ["--clips", "4", "--validation", "2", "--workers", "1"]),
    ("data_recipes (finevision|live_whisperx|llava_video)", ["--workers", "1"]),
    ("casa_train .*dry_run=true", []),
    (
        "casa_train .*model=tiny_llama_siglip2",
        [override for override in RUN if ".vision." not in override],
    ),
    ("casa_train .*experiment=demo_live ", [*RUN, "data.image_tokens=200", "data.text_tokens=200"]),
    ("casa_train .*data=mine", [*OWN_CONF, *OWN_SIZES]),
    ("casa_train .*export.best=true", VALIDATED),
    ("casa_train -m .*sweep=fusion_demo", VALIDATED),  # validations are what is compared
    ("casa_train .*evaluation.benchmarks=", [*VALIDATED, "data.text_tokens=320"]),
    ("casa_train ", RUN),
    ("casa_train.evaluate .*--benchmarks", ["--samples", "2"]),
    ("casa_train.evaluate ", ["evaluation.max_samples=6"]),
    (
        "casa_train.bench streaming .*--fps",
        ["--turns", "2", "--size", "tiny", "--image-size", "56", "--rounds", "1", "--most", "2"],
    ),
    ("casa_train.bench streaming", ["--turns", "3", "--size", "tiny", "--image-size", "56"]),
    ("casa_train.bench attention", ["--scale", "0.004", "--repeats", "1"]),
    ("casa_train.bench packing", ["--samples", "4000", "--steps", "16", "--sources", "0"]),
    ("casa_train.bench images", ["--images", "1", "--repeats", "1"]),
    ("casa_train.bench step", ["--steps", "1", "--warm-up", "1", "--set", *BUDGETS]),
    ("casa_train.bench faults", ["--kills", "1", "--processes", "1"]),
]
"""What is added to a command, `MODULE ARGUMENTS`, by the first pattern that it begins with."""

RAN, BIN = "ran.json", "bin"
DEMOS = ("demo", "demo-live")
CHAT = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ '<|' + message['role'] + '|>' }}{% endif %}"
    "{{ message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


class World:
    """The folder in which commands run.

    :param folder: where everything lies that the READMEs take for granted.
    :param ran: the commands and code that made it.
    """

    def __init__(self, folder: Path, ran: Iterable[str] = ()) -> None:
        self.folder = folder
        self.ran = set(ran)

    def run(self, words: Sequence[str]) -> None:
        """Runs a command of a README once; fails with its output."""
        command = shlex.join(words)
        if command in self.ran:
            return
        variables, words = leading_variables(words)
        if words[0] == "make" and words[1] in DEMOS:
            for line in make_lines(words[1]):
                self.run(line)
        elif words[0] == "make":
            assert any("pytest" in line for line in make_lines(words[1])), command
        elif words[:2] == ["python", "-m"]:
            self._start([sys.executable, *words[1:], *small(words[2:])], variables)
        else:
            self._start([*words, *RUN], variables)
        self.ran.add(command)

    def python(self, code: str) -> None:
        """Runs a block of Python once."""
        if code not in self.ran:
            self._start([sys.executable, "-c", code])
            self.ran.add(code)

    def _start(self, words: Sequence[str], variables: Mapping[str, str] | None = None) -> None:
        path = f"{self.folder / BIN}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        done = subprocess.run(
            words,
            cwd=self.folder,
            env={**environment(), "PATH": path, FORK_ALL: "1", **(variables or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout[-3000:]}"


def open_world(shared: Path, folder: Path) -> World:
    """A copy of a world.

    :param shared: made by `make_world`.
    """
    shutil.copytree(shared, folder, symlinks=True)
    if available():
        (folder / BIN).mkdir()
        write_python(folder / BIN / "python")
    return World(folder, json.loads((folder / RAN).read_text()))


def make_world(folder: Path) -> None:
    """A world after `make demo` and the first page's "your data"."""
    folder.mkdir()
    (folder / "launch").symlink_to(ROOT / "launch")
    Image.new("RGB", (56, 56), "orange").save(folder / "picture.png")
    save_model(folder / "my_model")
    save_tower(folder / "my_tower")
    write_tiny_export(folder / "my_captioner")
    write_film(folder / "clip.mp4", [Image.new("RGB", (64, 48), c) for c in ("red", "blue")], 1)
    write_toy(folder / "mine")
    for name in BENCHMARKS:
        write_benchmark(folder / "benchmarks", name, 4)
    world = World(folder)
    world.run(["make", "demo"])
    (own,) = [b for b in blocks(ROOT / "data_recipes" / "README.md") if b.language == "python"]
    world.python(own.text)
    (first,) = [b for b in blocks(ROOT / "README.md") if "# your data" in b.text]
    for words in first.commands():
        world.run(words)
    (folder / RAN).write_text(json.dumps(sorted(world.ran)))


def leading_variables(words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Takes a command apart: what it sets before it begins, as in `NPROC=4 launch/...`, and the
    rest.
    """
    rest = list(words)
    variables = {}
    while rest and (match := re.fullmatch(r"([A-Z0-9_]+)=(.*)", rest[0])):
        variables[match[1]] = match[2]
        del rest[0]
    return variables, rest


def small(words: Sequence[str]) -> list[str]:
    """What makes a command small."""
    command = " ".join(words) + " "
    return next((more for pattern, more in SMALL if re.match(pattern, command)), [])


def make_lines(target: str) -> list[list[str]]:
    """The commands of a target, without its set-up, as a user would type them."""
    printed = subprocess.run(
        ["make", "--dry-run", "--no-print-directory", target],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    lines = [
        shlex.split(line)
        for line in re.findall(r"^(?:[A-Z0-9_]+=\S* )*\S*/python (-m .*)$", printed, re.M)
    ]
    return [["python", *words] for words in lines if words[1] != "pip"]


def save_model(path: Path) -> None:
    """A tiny Llama with a tokenizer and a chat template, as the hub would hold it."""
    tokenizer = build_tokenizer()
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(path)
    torch.manual_seed(1)
    config = tiny_text_config(vocab_size=len(tokenizer))
    AutoModelForCausalLM.from_config(config).save_pretrained(path)


def save_tower(path: Path) -> None:
    """A tiny Qwen2.5-VL, language model included."""
    torch.manual_seed(2)
    text = dict(
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        rope_scaling={"type": "mrope", "mrope_section": list(MROPE_SECTION)},
    )
    vision = tiny_vision_config(depth=4).to_dict()
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(path)
