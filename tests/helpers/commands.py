"""Starts the project's commands as a user would: in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# The chat template of the rendered dataset's tokenizer.
TEMPLATE = {
    "bos": "<|bos|>",
    "user_start": "<|user|>",
    "user_end": "<|end|>",
    "assistant_start": "<|assistant|>",
    "assistant_end": "<|end|>",
}

# A model and budgets so small that a step takes milliseconds.
TINY = [
    "evaluation.every=0",
    "trainer.log_every=1",
    "parallel.precision=fp32",
    "parallel.threads=1",
    "data.workers=0",
    "data.text_tokens=160",
    "data.image_tokens=64",
    "data.packs_per_step=2",
    "model.backbone.config.hidden_size=32",
    "model.backbone.config.intermediate_size=48",
    "model.backbone.config.num_hidden_layers=2",
    "model.backbone.config.num_attention_heads=2",
    "model.backbone.config.num_key_value_heads=1",
    "model.vision.config.depth=2",
    "model.vision.config.hidden_size=32",
    "model.vision.config.intermediate_size=48",
    "model.vision.config.num_heads=2",
    "model.vision.config.out_hidden_size=32",
    "model.vision.config.fullatt_block_indexes=[1]",
]


def prepare_data(out: Path, samples: int = 240) -> Path:
    """Renders a dataset with the real recipe."""
    # Here, because `make test-compat` has not what recipes import.
    from data_recipes.__main__ import main as recipes

    arguments = ["--samples", str(samples), "--validation", "24", "--seed", "3", "--workers", "1"]
    assert recipes(["synthetic", "--out", str(out), *arguments]) == 0
    return out


def on_data(data: Path) -> list[str]:
    """Overrides that point a configuration at a prepared dataset."""
    return [
        f"model.tokenizer={data}/tokenizer",
        f"data.sources.synthetic.path={data}/train",
        f"data.validation.synthetic.path={data}/validation",
    ]


def environment() -> dict[str, str]:
    """The environment of child processes: this checkout, no GPU, no hub, one thread."""
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    # Packages may lie there, too.
    folders = [x for x in clean.get("PYTHONPATH", "").split(os.pathsep) if x not in ("", str(ROOT))]
    return {
        **clean,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *folders]),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
    }


def train_command(overrides: Sequence[str], processes: int = 1) -> list[str]:
    """The command line of a training run, under torchrun for several processes."""
    if processes == 1:
        return [sys.executable, "-m", "casa_train", *overrides]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*torchrun, f"--nproc_per_node={processes}", "-m", "casa_train", *overrides]


def run(
    command: Sequence[str], check: bool = True, gpu: bool = False
) -> subprocess.CompletedProcess[str]:
    """Runs a command in the checkout; fails with its output.

    :param gpu: show it the GPUs there are.
    """
    env = environment()
    if gpu:
        del env["CUDA_VISIBLE_DEVICES"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    if check and done.returncode != 0:
        raise AssertionError(
            f"{' '.join(command)} left with {done.returncode}\n{done.stdout[-3000:]}\n"
            f"{done.stderr[-6000:]}"
        )
    return done
