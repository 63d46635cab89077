"""`DSLAConfig`: what a conversion is. It is the PEFT config of an adapter, and in plain form part of a hybrid's config."""

from __future__ import annotations

import math
from dataclasses import InitVar, dataclass, field
from typing import Any

from peft import PeftConfig

from dsla_kernels import check_lower_bound

from ..compat.peft_type import DSLA
from ..core.checks import check_rotary, check_window, half_life_to_logit
from ..levels.reading import is_whole, parse_level
from .architectures import head_dim_of, rotary_of

FORMAT_VERSION = 2

# Which release of this package reads which format, for the message of an older release that meets a newer file.
FIRST_RELEASE_OF_FORMAT = {1: "0.1", 2: "0.1"}

# What a level counts: whole layers, or KV heads with the query heads that read them.
UNITS = ("layer", "head")
Unit = int | tuple[int, int]

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")

# Which channels share a decay. Files of format 1 do not say: their layers paired all channels as (i, i + K/2).
ROTARY = ("rotary_layout", "rotary_dim")
# Tasks for which PEFT trains no head beside the adapter.
HEADLESS = ("CAUSAL_LM", "FEATURE_EXTRACTION")

# What the mathematics of a converted layer depends on: stored in hybrids, equal in adapter and hybrid.
GATES = ("gate_rank", "gate_normalizer", "gate_lower_bound", "half_lives", "write_gate")
MATHEMATICS = ("window_size", "sink_tokens", "states", *GATES, *ROTARY)


@dataclass
class DSLAConfig(PeftConfig):
    """Configuration of a Dual-State Linear Attention conversion.

    `DSLAConfig(conversion_order=[3, 1, 2], level=2)` has weights for layers 3, 1 and 2, and runs layers 3 and 1 as DSLA. A model takes
    a copy of it, `model.peft_config["default"]`: one config may be given to several models. `DSLAConfig()` has weights for all layers and
    starts at level 0, the original model.

    allow_untested: convert a base of a type that is not among the supported ones, if small models of it pass the checks (seconds on a CPU).
    Not saved; what is, is which checks it has passed (`checked_base`).

    Raises:
        ValueError: names the field whose value does not fit, before a model is touched.
    """

    target_modules: list[str] | None = field(
        default=None, metadata={"help": "Names of the attention modules to convert. Default: 'self_attn'."}
    )
    exclude_modules: list[str] | None = field(default=None, metadata={"help": "Names of modules never to convert."})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Other modules to train and to save in the adapter, as in every PEFT method."}
    )
    conversion_order: list[Any] | None = field(
        default=None,
        metadata={
            "help": "Layers with DSLA weights, least harmful first; with conversion_unit 'head' pairs [layer, KV head]. Default: all of "
            "them by number; `rank_layers` finds a better order of layers."
        },
    )
    level: int | None = field(
        default=None,
        metadata={
            "help": "How many layers (or heads) of the order are DSLA (0: the original model). Default: all of a conversion_order that is "
            "given; without one none, until set_level()."
        },
    )
    conversion_unit: str = field(
        default="layer",
        metadata={"help": "What order and level count: 'layer', or 'head', a KV head of a layer with the query heads that read it."},
    )
    window_heads: list[Any] | None = field(
        default=None, metadata={"help": "Pairs [layer, KV head] that keep a window alone, without states (reserved: refused for now)."}
    )
    window_size: int = field(
        default=128,
        metadata={"help": "Tokens that every token sees by softmax attention, an even number. 0: no window, as in the paper."},
    )
    sink_tokens: int = field(default=4, metadata={"help": "First tokens of a text that the window always sees beside its own."})
    states: bool = field(
        default=True,
        metadata={"help": "Whether converted heads have the two states; False: a window alone, without gates."},
    )
    gate_rank: int = field(default=16, metadata={"help": "Rank of the map from a value vector to its gates."})
    gate_normalizer: float = field(default=16.0, metadata={"help": "Divides the log-sigmoid of the gates."})
    gate_lower_bound: float = field(default=-1.25, metadata={"help": "Smallest log-decay per token, from -1.25 to below 0."})
    half_lives: tuple[tuple[float, float], tuple[float, float]] = field(
        default=((64.0, 4096.0), (8.0, 256.0)),
        metadata={
            "help": "Initial half-lives in tokens of the history and the recency state, each from its fastest channel to its slowest; "
            "one number stands for all channels of a state."
        },
    )
    write_gate: bool = field(
        default=True,
        metadata={"help": "Whether a token's value decides how much of it each state takes in. False: all of it, as in the paper."},
    )
    rotary_layout: str | None = field(
        default=None,
        metadata={"help": "How the base pairs the channels that it rotates, 'halves' or 'interleaved' (written by the library)."},
    )
    rotary_dim: int | None = field(
        default=None, metadata={"help": "How many channels of a head the base rotates, the first ones (written by the library)."}
    )
    trained_projections: tuple[str, ...] = field(
        default=("q_proj", "o_proj"),
        metadata={
            "help": "Projections of which DSLA has its own, trained copy. With k_proj or v_proj among them, raising the "
            "level in mid-text is approximate: the cache holds the original model's keys and values."
        },
    )
    order_scores: dict[str, float] | None = field(
        default=None, metadata={"help": "What `rank_layers` measured for each layer (written by the library)."}
    )
    level_metrics: dict[str, dict[str, float]] | None = field(
        default=None, metadata={"help": "Measurements per level for the model card, e.g. {'4': {'perplexity': 23.7}}."}
    )
    base_model_type: str | None = field(default=None, metadata={"help": "`model_type` of the base (written by the library)."})
    base_dimensions: dict[str, Any] | None = field(default=None, metadata={"help": "Sizes of the base (written by the library)."})
    base_fingerprint: dict[str, Any] | None = field(
        default=None, repr=False, metadata={"help": "Random projections of the base's attention weights (written by the library)."}
    )
    checked_base: dict[str, Any] | None = field(
        default=None, repr=False, metadata={"help": "Of a base of an untested type the checks that it has passed (written by the library)."}
    )
    format_version: int = field(default=FORMAT_VERSION, metadata={"help": "Version of the file format."})
    allow_untested: InitVar[bool] = False  # no field: it is not saved

    taken = False  # no field: whether a model has this very object

    def __post_init__(self, allow_untested: bool) -> None:
        super().__post_init__()
        if not isinstance(allow_untested, bool):
            raise ValueError(f"allow_untested must be True or False, got {allow_untested!r}")
        self.allow_untested = allow_untested
        self.peft_type = DSLA
        check_format_version(self.format_version)
        if self.target_modules is None:
            self.target_modules = ["self_attn"]
        if not isinstance(self.target_modules, (list, tuple, set)):
            raise ValueError(
                f"target_modules must be a list of module names such as ['self_attn'], no pattern, got {self.target_modules!r}: "
                "which layers are converted is said by conversion_order"
            )
        self.target_modules = sorted(self.target_modules)
        self.half_lives = _checked_half_lives(self.half_lives)
        self.trained_projections = tuple(name for name in PROJECTIONS if name in self._checked_projections())
        self._check_mathematics()
        if self.conversion_unit not in UNITS:
            raise ValueError(f"conversion_unit must be one of {list(UNITS)}, got {self.conversion_unit!r}")
        if self.window_heads is not None:
            self.window_heads = check_heads(self.window_heads, name="window_heads")
        if self.conversion_order is not None:
            self.conversion_order = self.check_units(self.conversion_order)
        self.level = self.check_level(self.level)
        if self.level_metrics is not None:
            self.level_metrics = {str(level): metrics for level, metrics in self.level_metrics.items()}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, subfolder: str | None = None, **kwargs: Any) -> Any:
        """As in PEFT, which keeps what is stored; `level`, as `resolve_level` takes it (a number, or a share of the model such as "50%"),
        and `task_type` take the place of it.

        Raises:
            ValueError: if the plan has no such level, or for another field of DSLA, whose stored value the weights go with.
        """
        given = {name: kwargs.pop(name) for name in ("task_type", *cls.__annotations__) if name in kwargs}
        level, task = given.pop("level", None), given.pop("task_type", None)
        if given:
            raise ValueError(f"{', '.join(given)} of a saved DSLA adapter cannot be changed when it is loaded: leave out all but level")
        config: Any = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        if level is not None and isinstance(config, DSLAConfig):
            plan = len(config.conversion_order or ())
            config.level = resolve_level(level, config, (config.base_dimensions or {}).get("num_hidden_layers", plan))
        if task not in (None, config.task_type, *HEADLESS):
            raise ValueError(f"task_type={task!r}: {pretrained_model_name_or_path} holds no head for it; give one of {HEADLESS}")
        config.task_type = task or config.task_type
        return config

    @property
    def layers_to_transform(self) -> list[int] | None:
        """PEFT's name for the layers to wrap: all of the plan, whatever the level."""
        if self.conversion_unit == "layer" or self.conversion_order is None:
            return self.conversion_order
        return list(dict.fromkeys(layer for layer, _ in self.conversion_order))

    @property
    def converted_layers(self) -> list[int]:
        """The layers that are wholly DSLA at the current level, in order.

        Raises:
            ValueError: if levels count heads, and no model has told yet how many a layer has.
        """
        if self.conversion_unit == "layer":
            return (self.conversion_order or [])[: self.level]
        return [layer for layer, heads in self._heads_by_layer().items() if len(heads) == self.kv_heads]

    @property
    def converted_heads(self) -> list[tuple[int, int]]:
        """The (layer, KV head) that are DSLA at the current level in layers that are not wholly so.

        Raises:
            ValueError: as for `converted_layers`.
        """
        if self.conversion_unit == "layer":
            return []
        whole = set(self.converted_layers)
        return [pair for pair in (self.conversion_order or [])[: self.level] if pair[0] not in whole]

    def heads_of(self, layer: int) -> tuple[int, ...]:
        """The KV heads of a layer that are DSLA at the current level, by number.

        Raises:
            ValueError: if all are, and no model has told yet how many a layer has.
        """
        if self.conversion_unit == "head":
            return self._heads_by_layer().get(layer, ())
        return tuple(range(self.kv_heads)) if layer in self.converted_layers else ()

    @property
    def kv_heads(self) -> int:
        """KV heads of a layer of the base.

        Raises:
            ValueError: before a model took this config.
        """
        if (heads := (self.base_dimensions or {}).get("num_key_value_heads")) is None:
            raise ValueError(
                "this DSLAConfig has no base_dimensions, so it cannot tell which layers are whole: ask the config of the model, "
                'model.peft_config["default"], after get_peft_model(model, config)'
            )
        return heads

    def order_of(self, layer: int) -> tuple[int, ...]:
        """All KV heads of a layer in the order in which they are converted; those that the plan leaves to the base last.

        Raises:
            ValueError: if no model has told yet how many a layer has.
        """
        planned = self.planned_heads(layer)
        return (*planned, *(head for head in range(self.kv_heads) if head not in planned))

    def planned_heads(self, layer: int) -> tuple[int, ...]:
        """The KV heads of a layer that a plan of heads names, in its order; none where levels count layers."""
        return self._planned()[2].get(layer, ()) if self.conversion_unit == "head" else ()

    def _heads_by_layer(self) -> dict[int, tuple[int, ...]]:
        """The converted heads by number of each layer that has any."""
        return self._planned()[1]

    def _planned(self) -> tuple[Any, dict[int, tuple[int, ...]], dict[int, tuple[int, ...]]]:
        """Of each layer the converted heads by number, and those of the plan in its order; asked for every layer in every forward, so kept
        until plan or level change, which come first."""
        order, level = self.conversion_order or [], self.level
        kept = self.__dict__.get("_by_layer")
        if kept is None or kept[0] != (level, order):
            converted: dict[int, list[int]] = {}
            planned: dict[int, list[int]] = {}
            for number, (layer, head) in enumerate(order):
                planned.setdefault(layer, []).append(head)
                if level is None or number < level:
                    converted.setdefault(layer, []).append(head)
            kept = self.__dict__["_by_layer"] = (
                (level, list(order)),
                {layer: tuple(sorted(heads)) for layer, heads in converted.items()},
                {layer: tuple(heads) for layer, heads in planned.items()},
            )
        return kept

    def check_units(self, order: Any, num_layers: int | None = None, num_heads: int | None = None, name: str = "conversion_order") -> list:
        """`order` as a list of distinct units of this config: layer numbers, or pairs (layer, KV head).

        Raises:
            ValueError: as `check_order` and `check_heads`.
        """
        if self.conversion_unit == "layer":
            return check_order(order, num_layers, name)
        return check_heads(order, num_layers, num_heads, name)

    @property
    def exact_fold(self) -> bool:
        """Whether the states computed from a softmax layer's cache are those the DSLA layer would have built."""
        return not {"k_proj", "v_proj"} & set(self.trained_projections)

    def check_level(self, level: int | None) -> int | None:
        """`level` if the plan has it; None stands for the whole plan where one is given.

        Raises:
            ValueError: if it is no whole number from 0 to the number of layers (or heads) in the plan.
        """
        if level is None:
            return None if self.conversion_order is None else len(self.conversion_order)
        if not is_whole(level) or level < 0:
            raise ValueError(f"level must be a whole number of converted {self.conversion_unit}s, 0 or more, got {level!r}")
        if self.conversion_order is not None and level > len(self.conversion_order):
            units = f"{len(self.conversion_order)} {self.conversion_unit}s"
            listed = f" {self.conversion_order}" if self.conversion_unit == "layer" else ""
            raise ValueError(f"level {level} is above the plan: conversion_order holds {units}{listed}")
        return level

    def mathematics(self) -> dict[str, Any]:
        """Keyword arguments of `DualStateAttention` that are the same for every layer; the rotary ones once the base is known."""
        return {name: value for name in MATHEMATICS if (value := getattr(self, name)) is not None}

    def take_rotary(self, base: Any, base_model_type: str, source: str = "adapter_config.json") -> None:
        """Record how the base with this config rotates channels, or compare it with what is recorded.

        Raises:
            ValueError: if that is something else, or was not yet heeded when the weights were trained.
        """
        found, recorded = rotary_of(base, base_model_type), (self.rotary_layout, self.rotary_dim)
        rotates = "rotates {1} channels of a head in the layout {0!r}"
        if self.format_version == 1 and self.base_model_type is not None and found != ("halves", head_dim_of(base)):
            raise ValueError(
                f"{source}: written in format 1, in which channels i and i + {head_dim_of(base) // 2} of a head share a decay, but a "
                f"{base_model_type} base {rotates.format(*found)}: what it reads from far back depends on absolute positions. Such weights "
                "cannot be converted: distil them again with this release"
            )
        if recorded not in ((None, None), found):
            raise ValueError(
                f"{source}: made for a base that {rotates.format(*recorded)}, and this one {rotates.format(*found)}: "
                "load the base it was trained on, or leave rotary_layout and rotary_dim out of a new DSLAConfig"
            )
        self.rotary_layout, self.rotary_dim = found
        self.format_version = FORMAT_VERSION

    def to_hybrid_dict(self) -> dict[str, Any]:
        """The plain dict that a hybrid checkpoint stores as `config.dsla_config`: mathematics, converted layers (and heads of others,
        where levels count heads), the base's name if it has one, no further PEFT fields."""
        mathematics = self.mathematics() | {"half_lives": [list(pair) for pair in self.half_lives]}
        if self.states:  # as all have of which nothing is said
            del mathematics["states"]
        name = {"base_model_name_or_path": self.base_model_name_or_path} if self.base_model_name_or_path else {}
        return {
            "format_version": self.format_version,
            "base_model_type": self.base_model_type,
            **name,
            "converted_layers": list(self.converted_layers),
            **({} if self.conversion_unit == "layer" else self._head_entries()),
            **({} if self.checked_base is None else {"checked_base": self.checked_base}),
            **mathematics,
        }

    def _head_entries(self) -> dict[str, Any]:
        return {"conversion_unit": "head", "converted_heads": [list(pair) for pair in self.converted_heads]}

    @classmethod
    def from_hybrid_dict(cls, hybrid: dict[str, Any], source: str = "dsla_config", kv_heads: int | None = None) -> DSLAConfig:
        """The inverse of `to_hybrid_dict`; `source` names the file for error messages, `kv_heads` is how many a layer of the base has,
        which hybrids whose level counts heads do not say themselves.

        Raises:
            ValueError: if an entry is missing, unknown, or does not fit.
        """
        if not isinstance(hybrid, dict):
            raise ValueError(f"{source}: 'dsla_config' must be a dict as DSLAConfig.to_hybrid_dict() writes it, got {hybrid!r}")
        if (unit := hybrid.get("conversion_unit", "layer")) not in UNITS:
            raise ValueError(f"{source}: conversion_unit must be one of {list(UNITS)}, got {unit!r}")
        heads = unit == "head"
        known = {"format_version", "base_model_type", "converted_layers", *MATHEMATICS}
        known |= {"conversion_unit", *(["converted_heads"] if heads else [])}
        # What follows from the base, and what older files do not say: they mean layers, with states.
        expected = known - {*ROTARY, "states", *([] if heads else ["conversion_unit"])}
        if missing := sorted(expected - hybrid.keys()):
            raise ValueError(
                f"{source}: 'dsla_config' lacks {missing}. It replaces the stored one as a whole: "
                f"give all of {sorted(expected)}, or leave it out"
            )
        check_format_version(hybrid["format_version"], source)
        if unknown := sorted(hybrid.keys() - known - {"base_model_name_or_path", "checked_base"}):
            raise ValueError(f"{source}: 'dsla_config' has unknown entries {unknown}; known are {sorted(known)}")
        name = hybrid.get("base_model_name_or_path")
        if not isinstance(name, str | None):
            raise ValueError(f"{source}: 'dsla_config' must name the base by text, got base_model_name_or_path {name!r}")
        try:
            if heads:
                units: dict[str, Any] = _units_of_hybrid(hybrid, kv_heads)
            else:
                units = {"conversion_order": check_order(hybrid["converted_layers"], name="converted_layers")}
            return cls(
                **units,
                base_model_type=hybrid["base_model_type"],
                base_model_name_or_path=name,
                format_version=hybrid["format_version"],
                checked_base=hybrid.get("checked_base"),
                **{name: hybrid[name] for name in MATHEMATICS if name in hybrid},
            )
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None

    def _checked_projections(self) -> tuple[str, ...]:
        if isinstance(self.trained_projections, str) or not set(self.trained_projections) <= set(PROJECTIONS):
            raise ValueError(f"trained_projections must be a list out of {list(PROJECTIONS)}, got {self.trained_projections!r}")
        return tuple(self.trained_projections)

    def _check_mathematics(self) -> None:
        for name in ("window_size", "sink_tokens"):
            if not is_whole(getattr(self, name)):
                raise ValueError(f"{name} must be a number of tokens, got {getattr(self, name)!r}")
        check_window(self.window_size, self.sink_tokens, self.states)
        if not isinstance(self.write_gate, bool):
            raise ValueError(f"write_gate must be True or False, got {self.write_gate!r}")
        if not is_whole(self.gate_rank) or self.gate_rank < 1:
            raise ValueError(f"gate_rank must be a whole number, 1 or more, got {self.gate_rank!r}")
        if not _is_number(self.gate_normalizer) or not 0 < self.gate_normalizer < math.inf:
            raise ValueError(f"gate_normalizer must be a positive number, got {self.gate_normalizer!r}")
        if not _is_number(self.gate_lower_bound):
            raise ValueError(f"gate_lower_bound must be a number from -1.25 to below 0, got {self.gate_lower_bound!r}")
        try:
            check_lower_bound(self.gate_lower_bound)
        except ValueError as error:
            raise ValueError(f"gate_lower_bound: {error}") from None
        if self.rotary_layout is not None and self.rotary_dim is not None:
            check_rotary(self.rotary_layout, self.rotary_dim)
        elif (self.rotary_layout, self.rotary_dim) != (None, None):
            raise ValueError(
                f"rotary_layout and rotary_dim say one thing together, got {self.rotary_layout!r} and {self.rotary_dim!r}: leave both out, "
                "they follow from the base"
            )
        for half_life in (life for pair in self.half_lives for life in pair):
            half_life_to_logit(half_life, self.gate_normalizer)


def _checked_half_lives(half_lives: Any) -> tuple[tuple[float, float], tuple[float, float]]:
    """Two pairs of numbers (JSON gives lists; a number stands for a pair of it)."""
    pairs = (
        [entry if isinstance(entry, (list, tuple)) else (entry, entry) for entry in half_lives]
        if isinstance(half_lives, (list, tuple))
        else []
    )
    if len(pairs) != 2 or any(len(pair) != 2 or not all(map(_is_number, pair)) for pair in pairs):
        raise ValueError(
            "half_lives must be numbers of tokens for history and recency, each one number or (fastest channel, slowest channel), "
            f"got {half_lives!r}"
        )
    history, recency = pairs
    return (history[0], history[1]), (recency[0], recency[1])


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_order(order: Any, num_layers: int | None = None, name: str = "conversion_order") -> list[int]:
    """`order` as a list of distinct layer numbers, all below `num_layers` if that is given; `name` is for messages.

    Raises:
        ValueError: names the wrong, negative or repeated numbers.
    """
    if not isinstance(order, (list, tuple)) or not order or not all(map(is_whole, order)):
        pairs = isinstance(order, (list, tuple)) and any(isinstance(x, (list, tuple)) for x in order)
        hint = "; pairs [layer, KV head] take conversion_unit='head'" if pairs else ""
        raise ValueError(f"{name} must be a list of layer numbers, got {order!r}{hint}")
    order = list(order)
    if wrong := [layer for layer in order if layer < 0 or (num_layers is not None and layer >= num_layers)]:
        known = "0 or more" if num_layers is None else f"0 to {num_layers - 1}"
        raise ValueError(f"{name} names layers that do not exist: {wrong}; layers of this model are {known}")
    if repeated := sorted({layer for layer in order if order.count(layer) > 1}):
        raise ValueError(f"{name} names layers more than once: {repeated} in {order}")
    return order


def check_heads(order: Any, num_layers: int | None = None, num_heads: int | None = None, name: str = "conversion_order") -> list:
    """`order` as a list of distinct pairs (layer, KV head), below `num_layers` and `num_heads` where these are given.

    Raises:
        ValueError: names what is no pair, not there, or repeated.
    """
    if not isinstance(order, (list, tuple)) or not order:
        raise ValueError(f"{name} must be a list of pairs [layer, KV head], got {order!r}")
    if other := [x for x in order if not (isinstance(x, (list, tuple)) and len(x) == 2 and all(map(is_whole, x)))]:
        raise ValueError(
            f"{name} must hold pairs [layer, KV head] where heads are the unit, got {other[:5]}: conversion_unit='layer' takes layers"
        )
    pairs = [(layer, head) for layer, head in order]
    for what, numbers, count in (("layer", [x for x, _ in pairs], num_layers), ("KV head", [x for _, x in pairs], num_heads)):
        if wrong := [pair for pair, x in zip(pairs, numbers, strict=True) if x < 0 or (count is not None and x >= count)]:
            known = "0 or more" if count is None else f"0 to {count - 1}"
            raise ValueError(f"{name} names a {what} that does not exist in {wrong[:5]}: each {what} of this model is {known}")
    if repeated := sorted({pair for pair in pairs if pairs.count(pair) > 1} if len(set(pairs)) < len(pairs) else ()):
        raise ValueError(f"{name} names heads more than once: {repeated}")
    return pairs


def _units_of_hybrid(hybrid: dict[str, Any], kv_heads: int | None) -> dict[str, Any]:
    """Fields of the config of a hybrid whose level counts heads."""
    if kv_heads is None:
        raise ValueError("conversion_unit 'head' needs the number of KV heads of the base: read it by AutoConfig.from_pretrained")
    whole = check_order(hybrid["converted_layers"], name="converted_layers") if hybrid["converted_layers"] else []
    rest = check_heads(hybrid["converted_heads"], None, kv_heads, "converted_heads") if hybrid["converted_heads"] else []
    if twice := sorted({layer for layer, _ in rest} & set(whole)):
        raise ValueError(f"converted_heads names heads of layers {twice}, which converted_layers names as a whole: leave out one of them")
    pairs = [(layer, head) for layer in whole for head in range(kv_heads)] + rest
    return {"conversion_unit": "head", "conversion_order": pairs, "base_dimensions": {"num_key_value_heads": kv_heads}}


def unit_name(unit: Unit) -> str:
    """A unit in cards, scores and messages: layer `3`, or `3.1` for KV head 1 of layer 3."""
    return str(unit) if isinstance(unit, int) else ".".join(map(str, unit))


def resolve_level(level: int | str, config: DSLAConfig, num_layers: int) -> int:
    """The level that a user means by a number of units (`8`, `"8"`), by a share of the model's (`"50%"`), or where the unit is a head by
    what stays softmax attention (`"kept:10%"`, `"kept:9"` of the model's KV heads).

    A share counts all units of the model with its `num_layers` layers, as the paper speaks of 50 % DSLA, also where the plan holds fewer.
    Layers that are linear already count in no share.

    Raises:
        ValueError: if it is none of these, or more than the plan holds; names the value and what is allowed.
    """
    units, unit = len((config.base_dimensions or {}).get("convertible_layers", range(num_layers))), config.conversion_unit
    if unit == "head":
        units *= config.kv_heads
    plan = units if config.conversion_order is None else len(config.conversion_order)
    allowed = f"this plan has levels 0 to {plan}, which are shares of up to {math.floor(1000 * plan / units) / 10:g}%"
    try:
        resolved = parse_level(level, units, unit)
    except ValueError as error:
        raise ValueError(f"{error}; {allowed}") from None
    if resolved > plan:
        meaning = str(level) if str(level).strip().isdigit() else f"{level}, {resolved} of {units} {unit}s,"
        raise ValueError(f"level {meaning} is above the plan; {allowed}")
    return resolved


def check_format_version(version: Any, source: str = "adapter_config.json") -> None:
    """Raises ValueError for a format that this release cannot read, with the release that can."""
    if not isinstance(version, int) or version < 1:
        raise ValueError(f"{source}: format_version must be a whole number, 1 or more, got {version!r}")
    if version > FORMAT_VERSION:
        release = FIRST_RELEASE_OF_FORMAT.get(version, f"that writes format {version}")
        raise ValueError(
            f"{source}: written in format {version}, this release of dsla-hf reads up to {FORMAT_VERSION}; "
            f"install a release {release} or newer"
        )
