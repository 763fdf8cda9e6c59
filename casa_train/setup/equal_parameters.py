"""As many new parameters as wished: chosen by the configuration instead of by hand.

*New* are the parameters that a model has beyond the insertion model of the same configuration,
which is the plain backbone and the vision tower: biases, norms, gates, adapter layers and
resampler count, and where fusion replaces self-attention what was dropped is taken off. What
feed-forward networks were widened by to reach a number counts, too: the insertion model is narrow.

A backbone with random weights gets wider feed-forward networks, and options of the mechanism stay
as they are. A pretrained one has its width: there `every`, the blocks of hyper attention, the
Q-Former's layers and the width of the mechanism's own feed-forward networks are chosen.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from casa_train.config.bounds import MOST_COUNT
from casa_train.config.matched import as_given
from casa_train.config.model_schema import Matched
from casa_train.config.schema import Config
from casa_train.errors import UserError
from casa_train.modeling.configuration_casa import CasaConfig
from casa_train.modeling.mechanisms import HyperAttention, QFormerInsertion, build_mechanism
from casa_train.setup.model import unfrozen_model

TOLERANCE = 0.02
"""Share of the wished number that may be missing or too many."""
CLOSE = TOLERANCE / 2
"""Share for widths, which come close: two models so near to one number agree within TOLERANCE."""
# What widths are multiples of, best first: kernels like rows of many elements.
MULTIPLES = (64, 8, 4, 2, 1)
PLAIN = {"mechanism": "insertion"}
# The option of mechanisms that have feed-forward networks of their own (0: the default), and the
# attribute that holds their width.
FFN = "ffn_width"
MOST_LAYERS = 1000  # of a Q-Former
WIDTH = "model.backbone.config.intermediate_size"


@dataclass(frozen=True)
class Matching:
    """A configuration with its numbers chosen, and the model's.

    :param notes: what was chosen, for the start of a run.
    """

    config: Config
    model_config: CasaConfig
    notes: list[str]


def new_parameters(config: Config, model_config: CasaConfig) -> int:
    """Parameters of a model beyond the insertion model of its configuration.

    Of a run that widened its feed-forward networks to match parameters, the insertion model has
    the width from before (`model.matched`).

    :param config: a run's, as it is composed or stored; :param model_config: of its model.
    :raises UserError: a model that cannot be built.
    """
    counts = _Counts(as_given(config), _plain(config, model_config))
    return counts.new(model_config.fusion, _text(model_config).intermediate_size)


def match_parameters(config: Config, model_config: CasaConfig) -> Matching:
    """Chooses what `model.match` or `model.new_parameters` leaves open.

    :param model_config: of the model that `config` describes.
    :return: the same where neither is given; the run's own numbers where a start has written them.
    :raises UserError: a number that cannot be reached within TOLERANCE, or `model.matched` with
        numbers of another model.
    """
    model = config.model
    if model.matched is not None:
        _check_written(model.matched, new_parameters(config, model_config))
        return Matching(config, model_config, [_note(config, model.matched)])
    if not model.match and model.new_parameters is None:
        return Matching(config, model_config, [])
    counts = _Counts(config, model_config)
    wanted = counts.reference(model.match) if model.match else int(model.new_parameters or 0)
    width = _text(model_config).intermediate_size
    fusion = dict(config.fusion)
    matched = Matched(wanted)
    if model.backbone.pretrained is None:
        chosen_width = _width(counts, fusion, wanted)
        if chosen_width != width:
            matched.intermediate_size, width = width, chosen_width
    else:
        if chosen := _options(counts, fusion, wanted):
            matched.fusion, fusion = fusion, {**fusion, **chosen}
    matched.reached = counts.new(fusion, width)
    config = copy.deepcopy(config)
    config.fusion, config.model.matched = fusion, matched
    if matched.intermediate_size is not None:
        config.model.backbone.config["intermediate_size"] = width
    return Matching(config, counts.described(fusion, width), [_note(config, matched)])


class _Counts:
    """Counts parameters of a model with other options and widths, on the meta device.

    :param config: before anything is chosen; :param model_config: of its model.
    """

    def __init__(self, config: Config, model_config: CasaConfig) -> None:
        self.config, self.model_config = config, model_config
        self.width: int = _text(model_config).intermediate_size
        self._totals: dict[str, int] = {}

    def described(self, fusion: dict[str, Any], width: int) -> CasaConfig:
        """The model's configuration with another mechanism or width."""
        described = copy.deepcopy(self.model_config)
        described.fusion = dict(fusion)
        _text(described).intermediate_size = width
        return described

    def mechanism(self, fusion: dict[str, Any]) -> Any:
        """The mechanism with its options, where the model was built once."""
        return build_mechanism(fusion, self.model_config.text_config)

    def total(self, fusion: dict[str, Any], width: int) -> int:
        """Parameters of the whole model; tied ones count once."""
        key = json.dumps([fusion, width], sort_keys=True, default=str)
        if key not in self._totals:
            model = unfrozen_model(self.config, self.described(fusion, width))
            self._totals[key] = sum(parameter.numel() for parameter in model.parameters())
        return self._totals[key]

    def new(self, fusion: dict[str, Any], width: int | None = None) -> int:
        """Parameters beyond the insertion model, which has the width from before.

        :param width: of the feed-forward networks; None: that one.
        """
        total = self.total(fusion, self.width if width is None else width)
        return total - self.total(PLAIN, self.width)

    def reference(self, fusion: dict[str, Any]) -> int:
        """New parameters of the mechanism that `model.match` names.

        :raises UserError: there is none of that name, or not with these options.
        """
        try:
            return self.new(fusion)
        except UserError as error:
            raise UserError(f"model.match is {fusion!r}: {error}") from error


def _text(model_config: CasaConfig) -> Any:
    """The backbone's configuration."""
    return model_config.text_config


def _plain(config: Config, model_config: CasaConfig) -> CasaConfig:
    """The model's configuration with the width from before parameters were matched."""
    plain = copy.deepcopy(model_config)
    matched = config.model.matched
    if matched is not None and matched.intermediate_size is not None:
        _text(plain).intermediate_size = matched.intermediate_size
    return plain


def agrees(new: int, wanted: int, share: float = TOLERANCE) -> bool:
    """Whether a number of parameters is as good as another."""
    return abs(new - wanted) <= share * abs(wanted)


def _width(counts: _Counts, fusion: dict[str, Any], wanted: int) -> int:
    """The width of feed-forward networks with which a mechanism has the wished number.

    :raises UserError: the mechanism alone has more, or no width comes near.
    """
    own = counts.new(fusion)
    if agrees(own, wanted, CLOSE):
        return counts.width
    if own > wanted:
        if agrees(own, wanted):
            return counts.width
        raise UserError(
            f"{_asked(counts.config)} wants {wanted:,} new parameters, but fusion="
            f"{fusion['mechanism']} with its options has {own:,} as it is, and feed-forward "
            "networks are only widened; expected a number that is not below. Match the largest "
            "of the mechanisms that you compare, or leave this one out."
        )
    column = counts.new(fusion, counts.width + 1) - own
    exact = counts.width + (wanted - own) / column
    if exact > MOST_COUNT:
        raise UserError(
            f"{_asked(counts.config)} wants {wanted:,} new parameters, which would take "
            f"{WIDTH}={exact:,.0f}; expected at most {MOST_COUNT:,}. Ask for fewer."
        )
    reached: dict[int, int] = {}
    for share in (CLOSE, TOLERANCE):
        for multiple in MULTIPLES:
            width = max(counts.width, round(exact / multiple) * multiple)
            if width not in reached:
                reached[width] = counts.new(fusion, width)
            if agrees(reached[width], wanted, share):
                return width
    around = (int(exact), int(exact) + 1)
    found = [(counts.new(fusion, width), f"{WIDTH}={width}") for width in around]
    raise _unreachable(counts.config, wanted, found)


def _options(counts: _Counts, fusion: dict[str, Any], wanted: int) -> dict[str, Any]:
    """The options with which a mechanism beside a pretrained backbone has the wished number; none
    where those that it has do.

    Where its feed-forward networks have a width of their own, those are preferred that leave it
    nearest to what it is by default.

    :raises UserError: none do.
    """
    own = counts.new(fusion)
    if agrees(own, wanted, CLOSE):
        return {}
    found: list[tuple[int, dict[str, Any]]] = [(own, {})]
    wide: dict[int, float] = {}
    for options in _depths(counts, fusion, wanted):
        if options:
            with contextlib.suppress(UserError):  # such as blocks that all drop self-attention
                found.append((counts.new({**fusion, **options}), options))
        if isinstance(getattr(counts.mechanism(fusion), FFN, None), int):
            new, width, ratio = _own_width(counts, {**fusion, **options}, wanted)
            wide[width] = ratio
            found.append((new, {**options, FFN: width}))

    def distance(one: tuple[int, dict[str, Any]]) -> tuple[bool, float, int]:
        close = agrees(one[0], wanted, CLOSE)
        ratio = wide[one[1][FFN]] if close and FFN in one[1] else 0.0
        return not close, ratio, abs(one[0] - wanted)

    new, options = min(found, key=distance)
    if not agrees(new, wanted):
        words = [(new, _words(o) if o else "as it is") for new, o in found]
        raise _unreachable(counts.config, wanted, words)
    return options


def _depths(counts: _Counts, fusion: dict[str, Any], wanted: int) -> Iterator[dict[str, Any]]:
    """Options that say in how many blocks a mechanism stands, or how many layers its resampler has:
    those that it has (nothing) first.
    """
    yield {}
    mechanism = counts.mechanism(fusion)
    depth: int = _text(counts.model_config).num_hidden_layers
    if "every" in mechanism.options:
        given = mechanism.fusion["every"]
        for blocks in sorted({depth // every for every in range(1, depth + 1)}):
            same = [every for every in range(1, depth + 1) if depth // every == blocks]
            if given not in same:
                yield {"every": min(same, key=lambda every: abs(every - given))}
    elif isinstance(mechanism, HyperAttention):
        for number in range(1, depth + 1):
            if number != len(mechanism.layers):
                yield {"layers": spread(number, depth)}
    elif isinstance(mechanism, QFormerInsertion):
        one, two = (counts.new({**fusion, "layers": layers}) for layers in (1, 2))
        most = 1 + (wanted - one) // (two - one)  # that have no more than is wished for
        for layers in (most, most + 1):
            if 1 <= layers <= MOST_LAYERS and layers != mechanism.fusion["layers"]:
                yield {"layers": layers}


def _own_width(counts: _Counts, fusion: dict[str, Any], wanted: int) -> tuple[int, int, float]:
    """The width of a mechanism's own feed-forward networks that comes nearest to a number.

    :return: new parameters, the width, and how far that is from the default: |log| of their ratio.
    """
    plain: int = counts.mechanism({**fusion, FFN: 0}).ffn_width
    new = counts.new({**fusion, FFN: plain})
    column = counts.new({**fusion, FFN: plain + 1}) - new
    exact = plain + (wanted - new) / column
    for multiple in MULTIPLES:
        width = min(MOST_COUNT, max(1, round(exact / multiple) * multiple))
        reached = counts.new({**fusion, FFN: width})
        if agrees(reached, wanted, CLOSE):
            break
    return reached, width, abs(math.log(width / plain))


def spread(number: int, depth: int) -> list[int]:
    """Indices of so many blocks over the whole depth, the first and the last among them."""
    if number == 1:
        return [depth // 2]
    return [block * (depth - 1) // (number - 1) for block in range(number)]


def _asked(config: Config) -> str:
    """The field and its value, as a user gave it."""
    model = config.model
    if model.new_parameters is not None:
        return f"model.new_parameters={model.new_parameters}"
    return f"model.match={(model.match or {}).get('mechanism')}"


def _words(options: dict[str, Any]) -> str:
    return ", ".join(f"fusion.{name}={value}" for name, value in options.items())


def _new(one: tuple[int, Any]) -> int:
    return one[0]


def _unreachable(config: Config, wanted: int, found: list[tuple[int, str]]) -> UserError:
    """:param found: new parameters, and by what."""
    below = [one for one in found if one[0] <= wanted]
    above = [one for one in found if one[0] > wanted]
    nearest = [max(below, key=_new)] if below else []
    nearest += [min(above, key=_new)] if above else []
    numbers = " and ".join(f"{new:,} ({how})" for new, how in nearest)
    fixed = "" if config.model.backbone.pretrained is None else ", whose backbone is pretrained,"
    return UserError(
        f"{_asked(config)} wants {wanted:,} new parameters, but fusion="
        f"{config.fusion['mechanism']}{fixed} has none within {TOLERANCE:.0%} of it: the nearest "
        f"are {numbers}. Give model.new_parameters a number that all can have, or leave this "
        "mechanism out."
    )


def _check_written(matched: Matched, new: int) -> None:
    if new != matched.reached:
        raise UserError(
            f"model.matched says that the model has {matched.reached:,} new parameters, but it has "
            f"{new:,}: it was written by the start of another run. Set model.matched=null, and "
            f"the fields that it chose for that run ({WIDTH} or options of fusion) as yours are."
        )


def _note(config: Config, matched: Matched) -> str:
    """A line of what was chosen."""
    off = matched.reached - matched.wanted
    share = abs(off) / matched.wanted if matched.wanted else 0.0
    beside = "exactly" if not off else f"{share:.2%} {'more' if off > 0 else 'fewer'} than"
    fields = []
    if matched.intermediate_size is not None:
        now = config.model.backbone.config["intermediate_size"]
        fields.append(f"{WIDTH}={now} instead of {matched.intermediate_size}")
    for name, now in config.fusion.items() if matched.fusion else ():
        if name not in matched.fusion:
            fields.append(f"fusion.{name}={now}")
        elif now != matched.fusion[name]:
            fields.append(f"fusion.{name}={now} instead of {matched.fusion[name]}")
    chosen = ", ".join(fields) or "nothing had to change"
    return (
        f"parameters matched: {matched.reached:,} new ones, {beside} the {matched.wanted:,} of "
        f"{_asked(config)}: {chosen}"
    )
