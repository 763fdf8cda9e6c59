"""What a benchmark is: its arguments, its run, and the report that comes out."""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

from casa_train.config.bounds import local_path
from casa_train.io.numbers import count
from casa_train.io.precision import DTYPES as PRECISIONS

DTYPES = {**PRECISIONS, "fp16": torch.float16}


@dataclass
class Report:
    """:param text: what to print; :param data: the same and more, ready for JSON."""

    text: str
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Benchmark:
    """:param measures: one sentence for `--help`; :param description: method, for its own
    `--help`.
    """

    measures: str
    description: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], Report]


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bf16 on cuda, fp32 on the CPU")
    parser.add_argument("--seed", type=int, default=0, help="of weights and inputs (default: 0)")
    parser.add_argument(
        "--json", type=local_path, metavar="FILE", help="also write every number to FILE"
    )


def device_and_dtype(arguments: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    name = arguments.dtype or ("bf16" if device.type == "cuda" else "fp32")
    return device, DTYPES[name]


def machine(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Where the numbers were measured."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{platform.machine()} CPU, {os.cpu_count()} cores"
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def describe_machine(facts: dict[str, Any]) -> str:
    threads = facts["threads"]  # a list where they differ between what is compared
    said = count(threads, "thread") if isinstance(threads, int) else f"threads {threads}"
    return (
        f"{facts['device']}, {said}, {facts['dtype']}, "
        f"torch {facts['torch']}, transformers {facts['transformers']}"
    )
