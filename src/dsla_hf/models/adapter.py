"""The PEFT tuner: one adapter holds the DSLA weights of every layer in `conversion_order`; the level says which run."""

from __future__ import annotations

import copy
import functools
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method
from torch import nn
from transformers import GenerationMixin

from ..compat.attributes import copy_implementations, forget_conversions
from ..core.draft_cache import LayerPart
from ..core.tensor_parallel import MERGE_FIRST, cuts_heads, is_tensor_parallel
from ..levels.generation import generate_with_levels
from .adapter_layer import DSLALayer
from .architectures import SHORT_WINDOW, check_draftable, convertible_layers, kv_heads_of, sliding_window_of, text_base_of
from .base_attention import NO_HEADS
from .base_checks import check_finite, check_full_precision, check_model, check_readable, record_base
from .before_layers import install_layout_hook, masks_with_padding, remove_layout_hook
from .configuration import DSLAConfig, unit_name
from .decoder import attention_name, attentions_of, decoder_layers, decoder_of
from .hybrid import hybrid_classes
from .image_blocks import install_image_guard, remove_image_guard
from .level import active_config, dsla_layers, get_level, set_level
from .level_guards import check_training, check_training_at_level_0, guard_level, warn_of_untrained
from .multimodal import MULTIMODAL, inner_text_config, text_config_of
from .saving import name_model
from .sizes import unit_sizes
from .trial.records import record_of


class DSLAModel(BaseTuner):
    """Wraps a model of transformers, such as a causal LM or its bare decoder; made by `get_peft_model(model, DSLAConfig(...))`."""

    prefix = "dsla_"
    tuner_layer_cls = DSLALayer
    target_module_mapping: dict[str, list[str]] = {}
    warned_of_untrained = False  # True: `generate` does not say so, or not again
    decoder_name = ""  # in the model

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any):
        shared = getattr(model, "peft_config", None)  # PEFT writes into it before anything is checked
        before = dict(shared or {})
        try:
            super().__init__(model, *args, **kwargs)
        except Exception:
            if shared is not None:
                shared.clear()
                shared.update(before)
            raise

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("labels") is not None:  # `DSLATrainer`, whose levels may miss the layers that are trained, gives none
            check_training(self.model, self.training)
        return self.model(*args, **kwargs)

    # --- levels -------------------------------------------------------------------------------------------------

    def set_level(self, level: int | str) -> None:
        """Run the first `level` units of `conversion_order` as DSLA, layers or KV heads, from the next forward on. A cache of softmax
        layers is folded into states when a layer converted meets it.

        level: a number; or as text a number, a share of the model such as "50%", or "kept:10%" of its KV heads (see `resolve_level`).

        Raises:
            ValueError: if the plan has no such level.
        """
        set_level(self.model, level)

    def get_level(self) -> int:
        """How many units of `conversion_order` run as DSLA: layers, or KV heads where it names those."""
        return get_level(self.model)

    def set_conversion_order(self, order: list[Any], scores: dict[Any, float] | None = None) -> None:
        """Put the layers (or heads) of the plan in another order, e.g. that of `rank_layers`; the level stays. Measurements per level are
        dropped if the order changes: a level is another set of layers then.

        Raises:
            ValueError: if `order` does not hold the same layers.
        """
        config = active_config(self.model)
        order = config.check_units(order)
        if set(order) != set(config.conversion_order or ()):
            units = f"{config.conversion_unit}s"
            raise ValueError(f"the order {order} must hold the {units} that have DSLA weights: {sorted(config.conversion_order or ())}")
        if order != config.conversion_order:
            config.level_metrics = None
        config.conversion_order = order
        config.order_scores = None if scores is None else {unit_name(unit): float(scores[unit]) for unit in order}

    @contextmanager
    def converted(self, layers: list[Any]) -> Any:
        """Within the context, exactly `layers` (or KV heads, where the plan names those) run as DSLA: `with model.converted([5]): ...`."""
        config = active_config(self.model)
        plan, level = config.conversion_order or [], config.level
        layers = config.check_units(layers, name="converted") if layers else []
        if not set(layers) <= set(plan):
            raise ValueError(f"{config.conversion_unit}s {sorted(set(layers) - set(plan))} have no DSLA weights; the plan is {plan}")
        config.conversion_order, config.level = [*layers, *(i for i in plan if i not in layers)], len(layers)
        try:
            yield self
        finally:
            config.conversion_order, config.level = plan, level

    def set_trainable_layers(self, layers: list[int] | None = None) -> None:
        """Train the DSLA weights of these layers only (None: of all); the others keep their values."""
        for layer in dsla_layers(self.model).values():
            layer.frozen = layers is not None and layer.layer_idx not in layers
            layer.set_adapter(layer.active_adapters)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, and with `level_policy`: a policy, its name such as "prompt-length", a level, or a `LevelProcessor`. With
        `draft_level`, a level above that of the model, it guesses tokens at that level and checks them several at a time, one text a call:
        the text is the same (sampled text follows the same probabilities). `draft_tokens`: guesses in a round; None adapts their number.
        Says once if layers that take part were never trained."""
        if kwargs.get("draft_level") is not None:
            check_draftable(self.model.config, kwargs["draft_level"])
        if kwargs.get("draft_level") is not None and inner_text_config(self.model.config) is not None:
            raise ValueError(
                f"draft_level with {type(self.model).__name__}: drafts read text alone, and images would be left out; text_model(model) "
                "gives the text model, which drafts"
            )
        if not self.warned_of_untrained:
            self.warned_of_untrained = warn_of_untrained(self.model, any_level=kwargs.get("level_policy") is not None)
        return generate_with_levels(self.model.generate, self.model, self, args, kwargs)

    def layer_parts(self) -> list[LayerPart]:
        """What of each decoder layer is DSLA at the level of now, for drafts."""
        attentions = attentions_of(self.model)
        running: list[Any] = [x.running_attention() if isinstance(x, DSLALayer) else None for x in attentions]
        return [LayerPart() if x is None else LayerPart(x.dsla, x.split) for x in running]

    def level_sizes(self) -> dict[str, Any]:
        """Sizes that policies of `generate(level_policy=...)` reckon with."""
        config: Any = active_config(self.model)
        return {"min_level": 0, "max_level": len(config.conversion_order or ()), **unit_sizes(self.model, config)}

    # --- what PEFT asks of a tuner ------------------------------------------------------------------------------

    def _prepare_adapter_config(self, peft_config: DSLAConfig, model_config: dict) -> DSLAConfig:
        return peft_config

    def _check_target_module_exists(self, peft_config: DSLAConfig, key: str) -> Any:
        if not key.startswith(self.decoder_name):  # layers of what reads images have the same names
            return False
        # PEFT finds the number of a layer only in names that have something before "layers", which those of a bare decoder lack.
        return BaseTuner._check_target_module_exists(peft_config, f".{key}" if key.startswith("layers.") else key)

    def _prepare_model(self, peft_config: DSLAConfig, model: nn.Module) -> None:
        """Checks before anything is changed; records the base in the config, or compares it with what is recorded."""
        check_model(model, peft_config)
        decoder, layers = decoder_of(model), decoder_layers(model)
        self.decoder_name = next(name for name, module in model.named_modules() if module is decoder)
        base: Any = text_config_of(model.config)
        base_type = text_base_of(model.config) or base.model_type
        convertible = convertible_layers(base)
        attentions: list[Any] = attentions_of(model)
        heads = range(kv_heads_of(base))
        if peft_config.window_heads:
            raise NotImplementedError(
                f"window_heads {peft_config.window_heads[:5]}: heads that keep a window alone are reserved for a later release; leave the "
                "field out"
            )
        if peft_config.conversion_unit == "head" and cuts_heads(model):
            raise NotImplementedError(f"tensor parallel: {NO_HEADS}")
        if peft_config.conversion_order is None:
            # Layers with a short sliding window of their own gain nothing: they stay, unless the plan names them.
            windows = {i: sliding_window_of(attentions[i]) for i in convertible}
            peft_config.conversion_order = [i for i, window in windows.items() if window is None or window > SHORT_WINDOW]
            if not peft_config.conversion_order:
                raise ValueError(
                    f"this model has a sliding window of {SHORT_WINDOW} tokens or fewer in every layer, so DSLA has nothing to gain; "
                    "name the layers in conversion_order to convert them all the same"
                )
            if peft_config.conversion_unit == "head":
                peft_config.conversion_order = [(layer, head) for layer in peft_config.conversion_order for head in heads]
            if peft_config.level is None:
                peft_config.level = 0  # as a new LoRA, a new adapter changes nothing
        peft_config.conversion_order = peft_config.check_units(peft_config.conversion_order, len(layers), len(heads))
        peft_config.level = peft_config.check_level(peft_config.level)
        if others := [i for i in peft_config.layers_to_transform or () if i not in convertible]:
            raise ValueError(
                f"conversion_order names layers {others}, which are no attention that DSLA could replace ("
                f"{', '.join(sorted({base.layer_types[i] for i in others}))}); those that are: {convertible}"
            )
        if peft_config.base_model_type is None and peft_config.target_modules == ["self_attn"]:  # the default
            peft_config.target_modules = [attention_name(model.config)]
        for index in peft_config.layers_to_transform or ():
            layer: Any = layers[index]
            if not any(hasattr(getattr(layer, name, None), "head_dim") for name in peft_config.target_modules or ()):
                raise ValueError(
                    f"target_modules {peft_config.target_modules} names no attention of layer {index}, whose modules are "
                    f"{[name for name, _ in layer.named_children()]}; leave target_modules out"
                )
            check_readable(attentions[index], peft_config)
        if peft_config.base_model_type in (None, base_type):  # else the next line says that it is another base
            peft_config.take_rotary(base, base_type)
        record_base(peft_config, model)
        peft_config.checked_base = record_of(base_type)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = self.peft_config[adapter_name]
        known = next((layer.configs[adapter_name] for layer in dsla_layers(model).values() if adapter_name in layer.configs), None)
        if known is None:
            # A copy: level, plan and what is recorded of the base belong to this model, whatever else the config is given to. PEFT
            # promises that a loaded adapter has the very config that it is loaded with, so the first model keeps that.
            if not config.inference_mode or config.taken:
                config = self.peft_config[adapter_name] = copy.deepcopy(config)
            config.taken = True
        elif known is not config:
            raise ValueError(
                f"the model has a DSLA adapter {adapter_name!r} already: set_level() changes its level, another adapter_name adds a second "
                "one, unload() takes it off"
            )
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        decoder: Any = decoder_of(self.model)
        install_layout_hook(decoder)
        install_image_guard(self.model, self.model.config.model_type)
        if isinstance(self.model, GenerationMixin):
            make_masks = getattr(type(self.model), "create_masks_for_generate", None)
            self.model.create_masks_for_generate = functools.partial(masks_with_padding, make_masks, decoder)
        if not hasattr(decoder, "_dsla_level_guard"):
            decoder._dsla_level_guard = decoder.register_forward_hook(guard_level)
            decoder._dsla_training_guard = decoder.register_forward_pre_hook(check_training_at_level_0)

    def _create_and_replace(
        self, peft_config: DSLAConfig, adapter_name: str, target: nn.Module, target_name: str, parent: nn.Module, current_key: str
    ) -> None:
        layer = target if isinstance(target, DSLALayer) else DSLALayer(target)
        layer.update_layer(adapter_name, peft_config, inference_mode=peft_config.inference_mode, model=self.model, key=current_key)
        if layer is not target:
            layer.set_adapter(self.active_adapters, inference_mode=peft_config.inference_mode)
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Weights stay in the base's dtype; `DSLATrainer` makes fp32 masters of what it trains."""

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        if not isinstance(adapter_name, str) and len(adapter_name) != 1:
            raise ValueError(f"one DSLA adapter is active at a time, got {list(adapter_name)}; for more layers raise the level")
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        # PEFT lets every layer choose its own successor.
        if self.peft_config:
            self.set_adapter(next((name for name in self.active_adapters if name in self.peft_config), next(iter(self.peft_config))))

    def _unload_and_optionally_merge(
        self, merge: bool = True, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        model = self.model
        if merge and adapter_names is not None:
            names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
            if unknown := sorted(set(names) - set(self.peft_config)):
                raise ValueError(f"adapter_names: there are no adapters {unknown}, only {sorted(self.peft_config)}")
            active: Any = self.active_adapters[0]
            self.set_adapter(names)
            try:
                return self._unload_and_optionally_merge(merge, progressbar, safe_merge)
            except Exception:
                self.set_adapter(active, inference_mode=self.peft_config[active].inference_mode)
                raise
        config = active_config(model) if merge else None
        if merge and safe_merge:
            check_finite(model)
        hybrid_class = None
        if config is not None and config.level:
            if is_tensor_parallel(model):
                raise ValueError(f"each process holds a part of base and adapter, which are merged whole: {MERGE_FIRST}")
            check_full_precision(model)
            hybrid_class = hybrid_classes(_hybrid_type(model, config))[1]
            if not issubclass(hybrid_class, type(model)):
                raise ValueError(
                    f"only a causal LM becomes a hybrid, not {type(model).__name__}: load the adapter over AutoModelForCausalLM, "
                    "and merge that"
                )
        decoder: Any = decoder_of(model)
        super()._unload_and_optionally_merge(merge, progressbar=progressbar, safe_merge=safe_merge)
        for guard in ("_dsla_level_guard", "_dsla_training_guard"):
            getattr(decoder, guard).remove()
            delattr(decoder, guard)
        model.__dict__.pop("create_masks_for_generate", None)
        if hybrid_class is None or config is None:
            remove_layout_hook(decoder)
            remove_image_guard(model)
        else:
            _become_hybrid(model, hybrid_class, config)
        return model


def _hybrid_type(model: Any, config: DSLAConfig) -> str:
    """The `base_model_type` of the hybrid that a model becomes: its own where it is multimodal, as the adapter names its text model's."""
    return model.config.model_type if model.config.model_type in MULTIMODAL else config.base_model_type or ""


def _become_hybrid(model: Any, hybrid_class: type, config: DSLAConfig) -> None:
    """Turn the base, whose converted layers are in place, into the hybrid class; the config object of the base stays as it was."""
    values = {name: value for name, value in model.config.to_dict().items() if name not in ("model_type", "architectures")}
    values.pop("quantization_config", None)  # of a file whose weights were dequantised as they were loaded
    dsla_config = config.to_hybrid_dict() | {"base_model_type": _hybrid_type(model, config)}
    if model.config.name_or_path:
        dsla_config.setdefault("base_model_name_or_path", model.config.name_or_path)
    hybrid_config = hybrid_class.config_class(**values, dsla_config=dsla_config)  # type: ignore[attr-defined]
    copy_implementations(model.config, hybrid_config)
    base_config = model.config
    taken = {id(base_config): hybrid_config}
    taken |= {id(getattr(base_config, name)): getattr(hybrid_config, name) for name in base_config.sub_configs}
    for module in model.modules():
        for name in ("config", "softmax_config"):
            if (config_of_module := getattr(module, name, None)) is not None and id(config_of_module) in taken:
                setattr(module, name, taken[id(config_of_module)])
    model.__class__ = hybrid_class
    install_layout_hook(decoder_of(model))  # adapters' layers are gone, and merged ones are there
    forget_conversions(model)
    hybrid_config.architectures = [hybrid_class.__name__]
    name_model(model, "")  # it lies nowhere yet: whoever loads by name would get the base
    if (quantiser := getattr(model, "hf_quantizer", None)) is not None:
        quantiser.remove_quantization_config(model)


register_peft_method(name="dsla", config_cls=DSLAConfig, model_cls=DSLAModel, prefix="dsla_")
