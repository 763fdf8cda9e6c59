"""First values for a model on the meta device, block by block: read from checkpoints, or drawn.

No rank ever holds more than one block that it will not keep. A drawn value depends on the seed and
the module's name alone, so it is the same on every rank and device and for every ZeRO stage.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from casa_train.setup.lora import plain_name

HOST = torch.device("cpu")
MEAN_ROWS = 1024  # that are added up at a time


class Values(Protocol):
    """Stored values by parameter name; see `pretrained.Stored`."""

    def __contains__(self, name: str) -> bool: ...

    def read(self, name: str) -> Tensor: ...


def blocks(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Names and modules that together hold every parameter: members of module lists, such as
    decoder layers, and outside of lists modules with parameters of their own.
    """
    for child_name, child in module.named_children():
        full = f"{name}.{child_name}" if name else child_name
        own = next(child.parameters(recurse=False), None) is not None
        if own or isinstance(module, nn.ModuleList):
            yield full, child
        else:
            yield from blocks(child, full)


def with_new_rows(stored: Tensor, rows: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A copy with more rows, the new ones the mean of the stored ones.

    Whether a parameter may have more rows than its stored value is checked where that is found.

    :param stored: (R, ...) of any dtype, R less than `rows`.
    :return: (rows, ...) `dtype`.
    """
    whole = torch.empty(rows, *stored.shape[1:], device=device, dtype=dtype)
    whole[: len(stored)].copy_(stored)
    total = torch.zeros(stored.shape[1:], dtype=torch.float64)
    for part in stored.split(MEAN_ROWS):  # a whole table in double precision may not fit
        total += part.double().sum(0)
    whole[len(stored) :].copy_(total / len(stored))
    return whole


class FirstValues:
    """Gives the modules of a model on the meta device their parameters.

    What stands behind an adapter goes by its plain name: it begins as it does without.

    :param draw: gives a module's own parameters their first values, by torch's default generator.
        None leaves NaN for a checkpoint to replace: what it does not bring spoils the first loss
        instead of training on unnoticed.
    :param stored: values that are read instead of drawn.
    :param device: where the parameters go, in `dtype`.
    """

    def __init__(
        self,
        draw: Callable[[nn.Module], None] | None,
        stored: Values,
        seed: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.draw, self.stored, self.seed = draw, stored, seed
        self.device, self.dtype = device, dtype
        self._made: dict[nn.Parameter, nn.Parameter] = {}  # what replaced what: tied ones stay tied

    @torch.no_grad()
    def fill(self, block_name: str, block: nn.Module) -> None:
        """Replaces the meta parameters of a block.

        :raises NotImplementedError: a parameter that `draw` leaves without a value.
        """
        for full_name, module in block.named_modules(prefix=block_name):
            name = plain_name(full_name)
            old = dict(module.named_parameters(recurse=False))
            drawn = [n for n, p in old.items() if not self._known(f"{name}.{n}", p)]
            if drawn:
                self._draw(name, module, drawn)
            for n, parameter in old.items():
                if parameter not in self._made:
                    if n in drawn:
                        value = getattr(module, n).to(self.device, self.dtype)
                    else:  # a copy even where nothing changes: the file must not stay mapped
                        stored = self.stored.read(f"{name}.{n}")
                        if stored.shape == parameter.shape:
                            value = stored.to(self.device, self.dtype, copy=True)
                        else:
                            rows = len(parameter)
                            value = with_new_rows(stored, rows, self.device, self.dtype)
                    made = nn.Parameter(value, requires_grad=parameter.requires_grad)
                    self._made[parameter] = made
                module.register_parameter(n, self._made[parameter])

    def _known(self, name: str, parameter: nn.Parameter) -> bool:
        return name in self.stored or parameter in self._made

    def _draw(self, name: str, module: nn.Module, drawn: list[str]) -> None:
        for n, parameter in dict(module.named_parameters(recurse=False)).items():
            empty = torch.full(parameter.shape, float("nan"), dtype=torch.float32, device=HOST)
            module.register_parameter(n, nn.Parameter(empty))
        if self.draw is None:
            return
        digest = hashlib.sha256(f"{self.seed} {name}".encode()).digest()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
            self.draw(module)
        for n in drawn:
            if bool(getattr(module, n).isnan().any()):
                raise NotImplementedError(
                    f"{type(module).__name__} gives {name}.{n} no first value: define "
                    "reset_parameters() on it"
                )
