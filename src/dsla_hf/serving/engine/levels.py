"""What the engine asks of a model about its levels, the same for a base alone, a base with a DSLA adapter, and a hybrid."""

from __future__ import annotations

import itertools
import math
from hashlib import blake2b
from typing import Any

import torch
from peft import PeftModel

from ...core.attention import DualStateAttention
from ...core.heads import HeadSplit
from ...core.tensor_parallel import cuts_heads
from ...models.adapter import active_config, dsla_layers, set_level
from ...models.architectures import base_type_of, has_linear_layers, heads_differ, kv_heads_of
from ...models.base_attention import DSLAAttentionMixin
from ...models.decoder import attentions_of, decoder_layers
from ...models.sizes import core_bytes

MOST_RUNGS = 16

Head = tuple[int, int]  # layer, KV head


def check_served(config: Any) -> None:
    """Raises ValueError for a model with this config whose layers keep something beside keys, values and DSLA states, or not the same of
    them."""
    if heads_differ(config):
        raise ValueError(
            f"{base_type_of(config)!r} has layers whose heads differ in size or number, for which the server has no blocks of memory: use "
            "generate() of the model, or on a GPU GraphDecoder(model).generate()"
        )
    if has_linear_layers(config):
        raise ValueError(
            f"{base_type_of(config)!r} has layers that are linear already, whose states the server does not keep: use generate() of the "
            "model, or on a GPU GraphDecoder(model).generate()"
        )


class Levels:
    """The levels of a causal LM.

    A level is a number of units, layers or KV heads. Of heads a server climbs a ladder: few levels, equally far apart, for which it has
    recordings, and groups of heads that go over together, whose keys and values share blocks of memory.

    Attributes:
        model: what is called. causal_lm: the model of transformers in it.
        unit: "layer" or "head". order: units that can be DSLA, least harmful first; level L is the first L of them.
        lowest, highest: levels that the model has. A hybrid has one, a base alone has level 0.
        ladder: those that are used, rising; see `cut`.
        groups: heads that have blocks of memory together: those of each rung, then those that never go over.
        columns: heads that a block has room for, as many as the largest group has.
        exact_fold: whether a running text may be raised without changing it.
        num_layers, num_units: of the model. kv_heads: of a layer, those of this process.
        window: tokens, of all DSLA layers; 0 if they have none, or not the same.
    """

    def __init__(self, model: Any):
        self.model = model
        causal_lm = model.base_model.model if isinstance(model, PeftModel) else model
        check_served(causal_lm.config)
        layers = decoder_layers(causal_lm)
        self.num_layers, self.kv_heads = len(layers), kv_heads_of(causal_lm.config)
        if cuts_heads(causal_lm):
            self.kv_heads //= causal_lm.tp_size
        self._wrapped = dsla_layers(causal_lm)
        self._attentions: list[Any] = attentions_of(causal_lm)
        self.unit = "layer"
        self.order: list[Any]
        if self._wrapped:
            config = active_config(causal_lm)
            self.unit = config.conversion_unit
            self.order, self.lowest, self.exact_fold = list(config.conversion_order or ()), 0, config.exact_fold
            self.cores = {i: wrapped.dsla_core[wrapped.adapter_name] for i, wrapped in self._wrapped.items() if wrapped.adapter_name}
        else:
            converted = {i: x for i, x in enumerate(self._attentions) if isinstance(x, DSLAAttentionMixin)}
            self.cores = {i: x.dsla for i, x in converted.items()}
            if any(x.split is not None for x in converted.values()):
                self.unit = "head"
                self.order = [(i, head) for i, x in converted.items() for head in self._converted_in(x)]
            else:
                self.order = list(converted)
            self.lowest, self.exact_fold = len(self.order), True
        self.highest = len(self.order)
        windows = {core.window_size for core in self.cores.values()}
        self.window = windows.pop() if len(windows) == 1 else 0
        self.causal_lm = causal_lm
        self.head_dim: int = self._attentions[0].head_dim
        self.num_units = self.num_layers * (self.kv_heads if self.unit == "head" else 1)
        self.dtype, self.device = causal_lm.dtype, causal_lm.device
        self.cut(self.highest)

    cores: dict[int, DualStateAttention]

    def cut(self, highest: int) -> None:
        """Make the ladder up to a level. Of layers each is a rung, whatever the limit; of heads there are `MOST_RUNGS` rungs at most, of
        equally many heads up to rounding, and `highest` is the last."""
        if self.unit == "layer" or self.lowest == self.highest:
            self.ladder = list(range(self.lowest, self.highest + 1))
        else:
            rungs = min(MOST_RUNGS, highest)
            self.ladder = [highest * rung // max(rungs, 1) for rung in range(rungs + 1)]
        self.groups = [self._heads(self.order[low:high]) for low, high in itertools.pairwise(self.ladder)]
        gone = set(self._heads(self.order[: self.ladder[-1]]))
        rest = [(layer, head) for layer in range(self.num_layers) for head in range(self.kv_heads) if (layer, head) not in gone]
        if self.unit == "layer":
            self.columns = self.kv_heads
        else:
            self.columns = max((len(group) for group in self.groups), default=max(math.ceil(len(rest) / MOST_RUNGS), 1))
        self.groups += [rest[start : start + self.columns] for start in range(0, len(rest), self.columns)]

    def rung(self, level: int) -> int:
        """The number of a level of the ladder, from 0: so many groups have gone over since the lowest."""
        return self.ladder.index(level)

    def converted(self, level: int) -> dict[int, tuple[int, ...]]:
        """The KV heads of each layer that are DSLA at a level, by number; layers without are left out."""
        heads: dict[int, list[int]] = {}
        for layer, head in self._heads(self.order[:level]):
            heads.setdefault(layer, []).append(head)
        return {layer: tuple(sorted(found)) for layer, found in heads.items()}

    def split(self, layer: int) -> HeadSplit | None:
        """How a layer that is converted in part at the present level has its heads, in the order in which it hands them over."""
        wrapped: Any = self._wrapped.get(layer)
        attention = self._attentions[layer] if wrapped is None else wrapped.running_attention()
        return getattr(attention, "split", None)

    def attentions_in_part(self) -> list[Any]:
        """The attentions of layers that are converted in part at the present level, as they run: they hold weights composed for it."""
        if self.unit == "layer":
            return []
        running = (wrapped.running_attention() for wrapped in self._wrapped.values())
        return [attention for attention in running if attention is not None and attention.split is not None]

    def identity(self) -> bytes:
        """Tells apart what reads texts now from what did before: another adapter, or another order of units, is another model at the same
        level. Weights that are changed in place cannot be told."""
        active = next((layer for layer in self._wrapped.values() if layer.adapter_name), None)
        adapter = None
        if active is not None:
            name: Any = active.adapter_name
            adapter = name, id(active.dsla_core[name]), active.disable_adapters, active.configs[name].conversion_order
        return blake2b(repr((id(self.causal_lm), adapter)).encode(), digest_size=32).digest()

    def use(self, level: int) -> None:
        """Run at this level from the next forward on."""
        if self._wrapped:
            set_level(self.causal_lm, level)

    def check(self, level: int, name: str) -> int:
        """`level`, if the model has it.

        Raises:
            ValueError: otherwise; `name` is what the user calls it.
        """
        if not self.lowest <= level <= self.highest:
            raise ValueError(f"{name} {level} cannot be had: this model's levels go from {self.lowest} to {self.highest}")
        return level

    def note(self, level: int) -> str:
        """What is said beside the number of a level: of heads, how many of the model's are kept."""
        return "" if self.unit == "layer" else f" ({self.num_units - level} of {self.num_units} KV heads kept)"

    def unit_bytes(self, kv_dtype: torch.dtype) -> dict[str, int]:
        """Bytes of the cache of one unit, for a text, as `Stats` has them; a base alone has no DSLA. kv_dtype: of softmax attention's."""
        heads, itemsize = 1 if self.unit == "head" else self.kv_heads, self.dtype.itemsize
        if not self.cores:
            return {"softmax_bytes_per_token": 2 * heads * self.head_dim * kv_dtype.itemsize}
        sizes = core_bytes(next(iter(self.cores.values())), heads, itemsize)
        return sizes | {"softmax_bytes_per_token": sizes["softmax_bytes_per_token"] * kv_dtype.itemsize // itemsize}

    def _heads(self, units: list[Any]) -> list[Head]:
        if self.unit == "head":
            return [(layer, head) for layer, head in units]
        return [(layer, head) for layer in units for head in range(self.kv_heads)]

    def _converted_in(self, attention: Any) -> tuple[int, ...]:
        return tuple(range(self.kv_heads)) if attention.split is None else attention.split.converted
