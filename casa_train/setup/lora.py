"""LoRA on the text decoder (arXiv 2106.09685), through peft: low-rank adapters that train beside
frozen linears.

peft puts a wrapper around each of the linears: theirs is `NAME.base_layer.weight`, the adapter's
are `NAME.lora_A.default.weight` (rank, inputs) and `NAME.lora_B.default.weight` (outputs, rank).
Everywhere else a linear keeps the name that it has without: *plain* names here.
"""

from __future__ import annotations

import contextlib
import json
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from casa_train.config.model_schema import BackboneConfig, LoraSettings
from casa_train.errors import UserError
from casa_train.setup.kept_adapters import CONFIG, PREFIX, WEIGHTS

ADAPTER = "default"  # peft's name of the only adapter
DOWN, UP = f".lora_A.{ADAPTER}", f".lora_B.{ADAPTER}"
GROUP = "lora."
"""Before an adapter's name where parameter groups look for theirs."""


def library() -> Any:
    """The module peft.

    :raises UserError: it is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise UserError(
            f"adapters (LoRA) need the package peft, which cannot be imported ({error}); expected "
            "it in this environment. Install it: pip install 'casa_train[lora]', or pip install "
            "peft."
        ) from error
    return peft


def is_adapter(name: str) -> bool:
    """Whether a parameter or a linear is an adapter's."""
    return (DOWN in name or UP in name) and ".fusion." not in name


def zero_gradient_at_start(name: str) -> bool:
    """Whether a parameter gets none on the first step: the other side of its adapter is zero."""
    return is_adapter(name) and DOWN in name


def plain_name(name: str) -> str:
    """The name that a parameter or a module would have without adapters."""
    return name.replace(".base_layer.", ".").removesuffix(".base_layer")


def plain_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """A model's parameters less those of adapters, by their plain names."""
    found = model.named_parameters()
    return {plain_name(name): p for name, p in found if not is_adapter(name)}


def add_adapters(model: Any, backbone: BackboneConfig) -> None:
    """Puts adapters around linears of the decoder's layers; on the meta device, shapes alone.

    :param model: a CasaForConditionalGeneration; what trains of it is set afterwards.
    :raises UserError: targets that are none, or no peft.
    """
    targets = find_targets(model.model, backbone.lora.targets)
    library().inject_adapter_in_model(settings(backbone.lora, targets), model.model)


def settings(lora: LoraSettings, targets: list[str]) -> Any:
    """peft's configuration.

    :param targets: whole names of linears in the model that it is for.
    """
    return library().LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        bias="none",
    )


def find_targets(decoder: nn.Module, patterns: list[str] | None) -> list[str]:
    """Names, within the decoder, of the linears that get adapters: of its layers alone, never of
    fusion, embeddings or head.

    :param patterns: see `LoraSettings.targets`.
    :raises UserError: a pattern that no linear matches.
    """
    linears, others = [], {}
    for name, module in decoder.named_modules():
        if name.startswith("layers.") and ".fusion" not in name and isinstance(module, nn.Linear):
            linears.append(name)
        elif name:
            others[name] = type(module).__name__
    chosen: set[str] = set()
    for pattern in [".*"] if patterns is None else patterns:
        matches = re.compile(pattern).fullmatch
        found = [name for name in linears if any(map(matches, _ends(name)))]
        if not found:
            there = sorted({re.sub(r"^layers\.\d+\.", "", name) for name in linears})
            hit = (n for n in others if any(map(matches, _ends(n))))
            wrong = next((f"{n} ({others[n]})" for n in hit), None)
            raise UserError(
                f"model.backbone.lora.targets: {pattern!r} matches no linear of the text decoder's "
                + ("layers" if wrong is None else f"layers, but {wrong}")
                + f"; expected names or patterns of linears in its layers: {', '.join(there)}. "
                "Fusion, vision tower, embeddings and head take no adapters."
            )
        chosen.update(found)
    return [name for name in linears if name in chosen]


def _ends(name: str) -> list[str]:
    """A name, and what of it stands behind each of its dots."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def adapter_ranks(model: Any) -> dict[str, int]:
    """The rank of every adapter by layer and linear, such as `0.q_proj`; empty without any."""
    ranks = {}
    for name, module in model.model.named_modules(prefix="model"):
        if is_adapter(name) and name.endswith(DOWN):
            layer, *_, linear = name.removesuffix(DOWN).removeprefix("model.layers.").split(".")
            ranks[f"{layer}.{linear}"] = int(module.out_features)
    return ranks


def first_draws(model: nn.Module, draw: Callable[[nn.Module], None]) -> Callable[[nn.Module], None]:
    """`draw` for a model that may have adapters: these begin as peft's do, down at random and up at
    zero, so that the model begins as it is without them.

    :param draw: gives a module's own parameters their first values.
    """
    downs = {module for name, module in model.named_modules() if name.endswith(DOWN)}
    ups = {module for name, module in model.named_modules() if name.endswith(UP)}

    def drawn(module: Any) -> None:
        if module in downs:
            nn.Linear.reset_parameters(module)
        elif module in ups:
            nn.init.zeros_(module.weight)
        else:
            draw(module)

    return drawn


@contextlib.contextmanager
def plain_layers(module: nn.Module) -> Iterator[None]:
    """Puts the linears themselves in the place of their wrappers meanwhile."""
    wrapped = [
        (parent, name, child)
        for parent in module.modules()
        for name, child in parent.named_children()
        if "base_layer" in child._modules
    ]
    for parent, name, child in wrapped:
        parent._modules[name] = child._modules["base_layer"]
    try:
        yield
    finally:
        for parent, name, child in wrapped:
            parent._modules[name] = child


def write_adapters(model: Any, lora: LoraSettings, folder: Path) -> None:
    """Writes a model's adapters in peft's own format, for the model as a whole.

    :raises OSError, SafetensorError: it cannot be written.
    """
    peft, decoder = library(), model.model
    with plain_layers(decoder):
        targets = [f"model.{name}" for name in find_targets(decoder, lora.targets)]
    found = peft.get_peft_model_state_dict(decoder, adapter_name=ADAPTER)
    tensors = {f"{PREFIX}model.{name}": value.contiguous() for name, value in found.items()}
    folder.mkdir()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    written = settings(lora, targets)
    written.inference_mode = True
    written.save_pretrained(str(folder))
    content = json.loads((folder / CONFIG).read_text())
    content["target_modules"] = targets  # peft's are a set, in another order every time
    (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n")


def attach_adapters(model: Any, folder: Path) -> Any:
    """An export's model with the adapters beside it, frozen, in their own precision.

    :raises UserError: no peft, or adapters that it cannot load.
    """
    try:
        peft = library()
        with warnings.catch_warnings():  # it asks transformers for what will have another name
            warnings.simplefilter("ignore", FutureWarning)
            wrapped = peft.PeftModel.from_pretrained(
                model, str(folder), autocast_adapter_dtype=False
            )
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"the adapters in {folder} cannot be loaded ({first}); expected them as the export "
            "wrote them. Copy the export again."
        ) from error
    return wrapped.get_base_model()


def merge_adapters(model: Any) -> None:
    """Adds the adapters to their linears, by peft, and takes the wrappers away.

    :raises UserError: an adapter with values that are not finite.
    """
    wrappers = [m for m in model.modules() if isinstance(m, library().tuners.lora.LoraLayer)]
    for wrapper in wrappers:
        try:
            wrapper.merge(safe_merge=True)
        except ValueError as error:
            raise UserError(f"the run's adapters cannot be merged: {error}") from error
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child in wrappers:
                setattr(parent, name, child.get_base_layer())
