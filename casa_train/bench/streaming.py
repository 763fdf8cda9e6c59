"""Streams of frames: what the first turns cost and what the last ones cost, model beside model."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache

from casa_train.bench import _paths
from casa_train.bench._benchmark import (
    Benchmark,
    Report,
    describe_machine,
    device_and_dtype,
    machine,
)
from casa_train.bench._paths import TokenClock
from casa_train.bench._timing import synchronise, tensor_bytes
from casa_train.config.bounds import local_path
from casa_train.errors import UserError
from casa_train.export.loading import load_model
from casa_train.io.quiet import quiet_libraries
from casa_train.io.tables import aligned
from casa_train.modeling.configuration_casa import CasaConfig
from casa_train.modeling.image_processing_casa import SIDE
from casa_train.modeling.modeling_casa import CasaForConditionalGeneration

METHOD = """\
Each turn gives generate_from_image(reset_streaming=False) one frame, then a few text tokens, and
takes N new tokens greedily. The streams take turns in one process, so that noise hits all of them:
the first turns are those of a second stream, which starts when the last turns of the long one
begin and alternates with them. Two turns of a stream that is thrown away warm each model up. Time
to first token runs from the call until the token is on the host, vision tower included; tokens/s
count the new tokens after it. The first turn of a stream has the prompt before its frame. First and
last are medians over up to eight turns, last/first their ratio; cache tokens, bytes and memory are
those of the long stream's first and last turn. Streaming state: the keys and values of the open
window, and the ids of the stream.

The sessions that CASA (arXiv 2512.19535) publishes, with random weights of the published sizes:
    python -m casa_train.bench streaming --size helium1-2b --image-size 896 --turns 256
It takes about 45 GiB of GPU memory.

--compare-paths decodes single turns in three ways instead: by decode steps, as streams do; by a
whole forward pass a token; and transformers' own generate on the plain backbone, without image.
Medians over --turns turns.
"""

WARM_UP_TURNS = 2
MEDIAN_OF = 8  # first and last turns, and at most a quarter of all

# Sizes of random models. smollm2-135m: SmolLM2-135M's with a small tower; helium1-2b: Helium1-2B's
# with the Qwen2.5-VL tower.
SIZES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "tiny": (
        dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, vocab_size=256)
        | dict(num_attention_heads=4, num_key_value_heads=2, head_dim=16),
        dict(depth=2, hidden_size=32, intermediate_size=48, num_heads=2)
        | dict(out_hidden_size=64, fullatt_block_indexes=[1]),
    ),
    "small": (
        dict(hidden_size=256, intermediate_size=768, num_hidden_layers=6, vocab_size=8192)
        | dict(num_attention_heads=4, num_key_value_heads=2, head_dim=64),
        dict(depth=4, hidden_size=160, intermediate_size=428, num_heads=2)
        | dict(out_hidden_size=256, fullatt_block_indexes=[3]),
    ),
    "smollm2-135m": (
        dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, vocab_size=49152)
        | dict(num_attention_heads=9, num_key_value_heads=3, head_dim=64, tie_word_embeddings=True),
        dict(depth=4, hidden_size=160, intermediate_size=428, num_heads=2)
        | dict(out_hidden_size=576, fullatt_block_indexes=[3]),
    ),
    "helium1-2b": (
        dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=28, vocab_size=64000)
        | dict(num_attention_heads=16, num_key_value_heads=8, head_dim=128),
        dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16)
        | dict(out_hidden_size=2048, fullatt_block_indexes=[7, 15, 23, 31]),
    ),
}
MECHANISMS = ("casa", "insertion")


@dataclass(frozen=True)
class Turn:
    """What one turn took and what the stream held after it.

    :param first_token: seconds until the first new token.
    :param tokens_per_second: of the new tokens after the first.
    :param cache_bytes: keys and values of the KV cache; `state_bytes`: all else the stream keeps.
    :param memory_bytes: weights, cache, state and temporaries at the turn's peak; None on the CPU.
    """

    first_token: float
    tokens_per_second: float
    cache_tokens: int
    cache_bytes: int
    state_bytes: int
    memory_bytes: int | None


class Stream:
    """One stream of a model and its cache."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.cache = DynamicCache()
        self.device = model.lm_head.weight.device
        self.weight_bytes = tensor_bytes(list(model.parameters()))

    def turn(self, ids: Tensor, point: int, frame: Tensor, new_tokens: int) -> Turn:
        """Enters ids (1, T) with a frame (3, H, W) before column `point`; takes `new_tokens`."""
        clock = TokenClock()
        cuda = self.device.type == "cuda"
        synchronise(self.device)
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
            allocated = torch.cuda.memory_allocated(self.device)
            own = self.weight_bytes + self.cache_bytes() + self.state_bytes()
        began = time.perf_counter()
        self.model.generate_from_image(
            ids,
            [frame],
            [[point]],
            reset_streaming=False,
            past_key_values=self.cache,
            max_new_tokens=new_tokens,
            do_sample=False,
            streamer=clock,
        )
        synchronise(self.device)
        memory = None
        if cuda:  # what the other streams hold is not this one's
            memory = own + torch.cuda.max_memory_allocated(self.device) - allocated
        return Turn(
            first_token=clock.arrivals[1] - began,  # the prompt comes back first
            tokens_per_second=clock.tokens_per_second(),
            cache_tokens=int(self.cache.get_seq_length()),
            cache_bytes=self.cache_bytes(),
            state_bytes=self.state_bytes(),
            memory_bytes=memory,
        )

    def cache_tensors(self) -> list[Any]:
        if hasattr(self.cache, "layers"):
            return [[layer.keys, layer.values] for layer in self.cache.layers]
        return [self.cache.key_cache, self.cache.value_cache]  # transformers 4

    def cache_bytes(self) -> int:
        return tensor_bytes(self.cache_tensors())

    def state_bytes(self) -> int:
        """What the stream keeps beside the cache; nothing counts twice that stands in both."""
        state = getattr(self.cache, "casa", None)
        return tensor_bytes(self.cache_tensors(), state) - self.cache_bytes()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--export",
        nargs="+",
        type=local_path,
        metavar="DIR",
        help="exports to compare (default: random models of casa and insertion)",
    )
    parser.add_argument(
        "--size", choices=SIZES, default="small", help="of random models (default: small)"
    )
    parser.add_argument("--turns", type=int, default=48, help="default: 48")
    parser.add_argument("--new-tokens", type=int, default=16, help="a turn (default: 16)")
    parser.add_argument("--text-tokens", type=int, default=2, help="a turn (default: 2)")
    parser.add_argument(
        "--prompt-tokens", type=int, default=22, help="before the first frame (default: 22)"
    )
    parser.add_argument(
        "--image-size", type=int, default=224, help="side of a frame in pixels (default: 224)"
    )
    parser.add_argument(
        "--compare-paths",
        action="store_true",
        help="ways to decode instead of first and last turns",
    )


def run(arguments: argparse.Namespace) -> Report:
    """Runs the streams side by side.

    :raises UserError: sizes that make no stream, or a directory that is no export.
    """
    check(arguments)
    device, dtype = device_and_dtype(arguments)
    torch.manual_seed(arguments.seed)
    models = load_models(arguments, device, dtype)
    facts, sources = machine(device, dtype), _sources(models, arguments)
    options = {k: v for k, v in vars(arguments).items() if k not in ("name", "json", "export")}
    if arguments.compare_paths:
        paths = _paths.compare_paths(models, arguments)
        text = "\n".join([describe_machine(facts), *sources, "", _paths.table(paths)])
        return Report(text, {"machine": facts, "arguments": options, "paths": paths})
    k = max(1, min(MEDIAN_OF, arguments.turns // 4))
    turns, young = play(models, arguments, k)
    streams = {
        label: {
            **summary(turns[label], young[label]),
            "turns": [asdict(turn) for turn in turns[label]],
            "first_turns": [asdict(turn) for turn in young[label]],
        }
        for label in models
    }
    shape = (
        f"{arguments.turns} turns of one {arguments.image_size}x{arguments.image_size} frame, "
        f"{arguments.text_tokens} text tokens and {arguments.new_tokens} new ones; first and last: "
        f"medians of {k}"
    )
    text = "\n".join([describe_machine(facts), *sources, shape, "", table(streams)])
    return Report(text, {"machine": facts, "arguments": options, "streams": streams})


def check(arguments: argparse.Namespace) -> None:
    """Refuses arguments that make no stream.

    :raises UserError: naming the argument.
    """
    for name, least in (("turns", 1), ("new_tokens", 2), ("text_tokens", 1), ("prompt_tokens", 0)):
        if getattr(arguments, name) < least:
            option = "--" + name.replace("_", "-")
            raise UserError(f"{option} is {getattr(arguments, name)}; it must be at least {least}.")
    if arguments.image_size < SIDE or arguments.image_size % SIDE:
        raise UserError(
            f"--image-size is {arguments.image_size}; it must be a positive multiple of {SIDE}, "
            "the side of an image token."
        )
    for path in arguments.export or []:
        if not (path / "config.json").is_file():
            raise UserError(
                f"--export {path}: config.json is missing. Expected a directory that "
                "'python -m casa_train.export' wrote."
            )


def load_models(
    arguments: argparse.Namespace, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Models by the label of their columns, in eval mode; none ends a turn early."""
    if arguments.export:
        quiet_libraries()
        loaded = [load_model(path, dtype) for path in arguments.export]
    else:
        loaded = [random_model(name, arguments.size, device) for name in MECHANISMS]
    models: dict[str, Any] = {}
    for model in loaded:
        label = str(model.config.fusion["mechanism"])
        if label in models:
            label += f" {len(models) + 1}"
        model.generation_config.eos_token_id = None
        models[label] = model.to(device, dtype).eval()
    return models


def random_model(mechanism: str, size: str, device: torch.device) -> CasaForConditionalGeneration:
    text, vision = SIZES[size]
    special = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
    config = CasaConfig(
        text_config={"model_type": "llama", **text, **special},
        vision_config={**vision, "window_size": 112},
        fusion={"mechanism": mechanism},
    )
    with device:
        model = CasaForConditionalGeneration(config)
    model.initialise_fusion()
    return model


def _sources(models: dict[str, Any], arguments: argparse.Namespace) -> list[str]:
    """A line for each model: where it comes from, and how large it is."""
    lines = []
    for label, model in models.items():
        parameters = sum(p.numel() for p in model.parameters())
        where = model.config.name_or_path if arguments.export else f"random, {arguments.size}"
        lines.append(f"{label}: {where}, {parameters / 1e6:,.1f} M parameters")
    return lines


def play(
    models: dict[str, Any], arguments: argparse.Namespace, k: int
) -> tuple[dict[str, list[Turn]], dict[str, list[Turn]]]:
    """All turns of a long stream of each model, and the first `k` turns of a young one that
    alternate with the last `k` of the long one.
    """
    generator = torch.Generator().manual_seed(arguments.seed)
    side, new_tokens = arguments.image_size, arguments.new_tokens
    frames = torch.randint(0, 256, (4, 3, side, side), generator=generator, dtype=torch.uint8)
    vocabulary = min(model.config.text_config.vocab_size for model in models.values())

    def turn(stream: Stream, index: int) -> Turn:
        prompt = arguments.prompt_tokens if index == 0 else 0
        shape = (1, prompt + arguments.text_tokens)
        draw = torch.Generator().manual_seed(arguments.seed + index)  # alike for every stream
        ids = torch.randint(0, vocabulary, shape, generator=draw).to(stream.device)
        return stream.turn(ids, prompt, frames[index % len(frames)], new_tokens)

    for model in models.values():
        warm_up = Stream(model)
        for index in range(WARM_UP_TURNS):
            turn(warm_up, index)
    old, young = ({label: Stream(model) for label, model in models.items()} for _ in range(2))
    turns: dict[str, list[Turn]] = {label: [] for label in models}
    first_turns: dict[str, list[Turn]] = {label: [] for label in models}
    order = list(models)
    for index in tqdm(range(arguments.turns), desc="turns", disable=None):
        for label in order:
            turns[label].append(turn(old[label], index))
            if (young_index := index - (arguments.turns - k)) >= 0:
                first_turns[label].append(turn(young[label], young_index))
        order.reverse()
    return turns, first_turns


def summary(turns: Sequence[Turn], young: Sequence[Turn]) -> dict[str, dict[str, float]]:
    """For each quantity that was measured its value in the first and in the last turns."""
    found: dict[str, dict[str, float]] = {}
    for name in ("first_token", "tokens_per_second"):
        first, last = (
            statistics.median(getattr(turn, name) for turn in part)
            for part in (young, turns[-len(young) :])
        )
        found[name] = {"first": first, "last": last}
    for name in ("cache_tokens", "cache_bytes", "state_bytes", "memory_bytes"):
        if getattr(turns[0], name) is not None:
            found[name] = {"first": getattr(turns[0], name), "last": getattr(turns[-1], name)}
    return found


ROWS = (
    ("time to first token, ms", "first_token", 1e3, ".1f"),
    ("decoding, tokens/s", "tokens_per_second", 1.0, ".1f"),
    ("KV cache, tokens", "cache_tokens", 1.0, ",.0f"),
    ("KV cache, MiB", "cache_bytes", 2.0**-20, ",.2f"),
    ("streaming state, MiB", "state_bytes", 2.0**-20, ",.2f"),
    ("memory at the peak, GiB", "memory_bytes", 2.0**-30, ",.2f"),
)


def table(streams: dict[str, dict[str, Any]]) -> str:
    """First, last and their ratio for every quantity, the streams side by side."""
    head, columns = [""], [""]
    for label in streams:  # an empty column keeps them apart
        head += ["", "", "", label]
        columns += ["", "first", "last", "last/first"]
    rows = [head, columns]
    for title, name, unit, style in ROWS:
        if any(name not in values for values in streams.values()):
            continue  # memory on the CPU
        row = [title]
        for values in streams.values():
            first, last = values[name]["first"], values[name]["last"]
            row += ["", f"{first * unit:{style}}", f"{last * unit:{style}}", f"{last / first:.2f}"]
        rows.append(row)
    return aligned(rows)


BENCHMARK = Benchmark(
    measures="first and last turns of a stream of frames: time to first token, tokens/s, KV cache "
    "and memory",
    description=METHOD,
    add_arguments=add_arguments,
    run=run,
)
