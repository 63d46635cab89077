"""What the engine asks of a model about its levels, the same for a base alone, a base with a DSLA adapter, and a hybrid."""

from __future__ import annotations

from typing import Any

from peft import PeftModel

from ...core.attention import DualStateAttention
from ...models.adapter import active_config, dsla_layers, set_level
from ...models.base_attention import NO_HEADS, DSLAAttentionMixin
from ...models.decoder import decoder_layers
from ...models.level import counts_heads


class Levels:
    """The levels of a causal LM.

    Attributes:
        model: what is called. causal_lm: the model of transformers in it.
        order: layers that can be DSLA, least harmful first; level L is the first L of them.
        lowest, highest: levels there are. A hybrid has one, a base alone has level 0.
        exact_fold: whether a running text may be raised without changing it.
        num_layers: of the model. window: tokens, of all DSLA layers; 0 if they have none, or not the same.
    """

    def __init__(self, model: Any):
        self.model = model
        causal_lm = model.base_model.model if isinstance(model, PeftModel) else model
        if counts_heads(causal_lm):
            raise NotImplementedError(f"the server: {NO_HEADS}")
        layers = decoder_layers(causal_lm)
        self.num_layers = len(layers)
        self._wrapped = dsla_layers(causal_lm)
        if self._wrapped:
            config = active_config(causal_lm)
            self.order, self.lowest, self.exact_fold = list(config.conversion_order or ()), 0, config.exact_fold
            self.cores = {i: self._wrapped[i].dsla_core[self._wrapped[i].adapter_name] for i in self.order}
        else:
            self.cores = {i: x.self_attn.dsla for i, x in enumerate(layers) if isinstance(x.self_attn, DSLAAttentionMixin)}
            self.order, self.lowest, self.exact_fold = list(self.cores), len(self.cores), True
        self.highest = len(self.order)
        windows = {core.window_size for core in self.cores.values()}
        self.window = windows.pop() if len(windows) == 1 else 0
        self.causal_lm = causal_lm
        attention: Any = layers[0].self_attn
        config = causal_lm.config
        self.kv_heads: int = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        self.head_dim: int = attention.head_dim
        self.dtype, self.device = causal_lm.dtype, causal_lm.device

    cores: dict[int, DualStateAttention]

    def converted(self, level: int) -> list[int]:
        """The layers that are DSLA at a level."""
        return self.order[:level]

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
