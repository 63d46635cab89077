"""The PEFT tuner: one adapter holds the DSLA weights of every layer in `conversion_order`; the level says which run.

`DSLALayer` wraps a base attention module and runs either it or a DSLA view of it. The view is a `DSLA...Attention` of
`modeling` whose modules are the base's own (k, v, norms) and the adapter's (`dsla_*`); it is not registered as a child,
so no weight has two names. Which layers are DSLA is read from the config at every call: `level` lives there alone.
"""

from __future__ import annotations

import copy
import functools
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftMixedModel, PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import register_peft_method
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin
from transformers.utils import logging

from ..compat import align_module_device, needed_for
from ..core.tensor_parallel import FEATURE, MERGE_FIRST, check_heads, cuts_heads, is_tensor_parallel, whole
from ..levels.generation import generate_with_levels
from .architectures import SHORT_WINDOW, SUPPORTED_BASES, fused_into, projection, sliding_window_of, why_unsupported
from .before_layers import install_layout_hook, masks_with_padding, remove_layout_hook
from .configuration import PROJECTIONS, DSLAConfig, check_order
from .fingerprint import check_base, fingerprint_of
from .hybrid import (
    attention_config,
    decoder_layers,
    decoder_of,
    dsla_attention_class,
    hybrid_classes,
    layer_bytes,
    new_dual_state_attention,
)
from .quantised import dequantised, quantised_weight
from .saving import name_model

logger = logging.get_logger(__name__)


class AdapterLinear(nn.Linear):
    """A trained copy of a projection. Computes in the input's dtype, so fp32 masters work over a bf16 base."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.to(input.dtype), None if self.bias is None else self.bias.to(input.dtype))


class FusedProjection(nn.Module):
    """A base's fused projection, some of whose parts are DSLA's own."""

    def __init__(self, base: nn.Linear, parts: tuple[str, ...], sizes: list[int], own: dict[str, AdapterLinear]):
        super().__init__()
        self.base, self.parts, self.sizes, self.own = base, parts, sizes, nn.ModuleDict(own)

    def forward(self, input: Tensor) -> Tensor:
        pieces = zip(self.parts, self.base(input).split(self.sizes, -1), strict=True)
        return torch.cat([self.own[part](input) if part in self.own else piece for part, piece in pieces], -1)

    def merged(self) -> AdapterLinear:
        """One projection that does the same."""
        fused = AdapterLinear(self.base.in_features, self.base.out_features, bias=self.base.bias is not None, device="meta")
        for name, parameter in self.base.named_parameters(recurse=False):
            pieces = zip(self.parts, parameter.detach().split(self.sizes), strict=True)
            rows = [getattr(self.own[part], name).detach().to(piece.dtype) if part in self.own else piece for part, piece in pieces]
            setattr(fused, name, nn.Parameter(torch.cat(rows), requires_grad=False))
        return fused


class DSLALayer(nn.Module, BaseTunerLayer):
    """Wraps an attention module. Containers are flat (`dsla_q_proj.<adapter>.weight`), as PEFT's key handling wants."""

    adapter_layer_names = ("dsla_core", *(f"dsla_{name}" for name in PROJECTIONS))
    other_param_names = ()

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ModuleDict())
        self.configs: dict[str, DSLAConfig] = {}
        self.frozen = False
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []
        self._view: tuple[Any, ...] | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)  # the decoder may ask for attributes of its attention

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_view": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._prepare_view()

    @property
    def adapter_name(self) -> str | None:
        """The active adapter, if this layer has weights of it."""
        return next((name for name in self.active_adapters if name in self.configs), None)

    @property
    def converted(self) -> bool:
        """Whether this layer runs as DSLA now."""
        name = self.adapter_name
        return name is not None and not self.disable_adapters and self.layer_idx in self.configs[name].converted_layers

    @property
    def untrained(self) -> bool:
        """Whether the active adapter's weights in this layer are those of its start: training moves mix and norm at once."""
        if self.adapter_name is None:
            return False
        core: Any = self.dsla_core[self.adapter_name]
        with align_module_device(core):
            return not core.mix_logits.any() and bool((core.norm_weight == 1).all())

    def adapter_parts(self) -> list[nn.Module]:
        """The modules of the active adapter."""
        return [getattr(self, part)[self.adapter_name] for part in self.adapter_layer_names if self.adapter_name in getattr(self, part)]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.converted:
            kwargs.pop("dsla_layout", None)
            return self.base_layer(*args, **kwargs)
        return self.dsla_attention()(*args, **kwargs)

    def dsla_attention(self) -> nn.Module:
        """The DSLA attention of the active adapter over this base attention, sharing their weights.

        Raises:
            RuntimeError: if the active adapter has no weights for this layer.
        """
        name = self.adapter_name
        if name is None:
            raise RuntimeError(f"the active adapter {self.active_adapters} has no weights for layer {self.layer_idx}")
        own = {part: getattr(self, f"dsla_{part}")[name] for part in self.configs[name].trained_projections}
        made_of = (name, self.dsla_core[name], dict(self.base_layer._modules), own)
        # Rebuilt when a module was replaced, e.g. by quantisation.
        if self._view is None or self._view[0] != made_of:
            modules = {**self.base_layer._modules, "dsla": self.dsla_core[name], **_own_projections(self.base_layer, own)}
            view: Any = _new_view(self.base_layer, modules)
            view.exact_fold = self.configs[name].exact_fold
            self._view = (made_of, view)
        view = self._view[1]
        view.training = self.training
        return view

    def _prepare_view(self) -> None:
        """Build the DSLA attention before a forward needs it: compiled code cannot, and would break its graph in every layer."""
        if self.adapter_name is not None:
            self.dsla_attention()

    def update_layer(self, adapter_name: str, config: DSLAConfig, inference_mode: bool = False, model: Any = None, key: str = "") -> None:
        """Add the weights of an adapter: projections copied from the base, the rest new. Both are cut as the model is in which this
        layer has the name `key`."""
        if adapter_name in self.configs:
            return
        self.configs[adapter_name] = config
        core = self.dsla_core[adapter_name] = new_dual_state_attention(self.base_layer, config)
        for name in config.trained_projections:
            getattr(self, f"dsla_{name}")[adapter_name] = _copy_linear(*projection(self.base_layer, name))
        if is_tensor_parallel(model):
            with needed_for(FEATURE):
                from ..core.head_sharding import cut_adapter_core, cut_adapter_linear
            cut_adapter_core(model, core)
            for name in config.trained_projections:
                cut_adapter_linear(model, getattr(self, f"dsla_{name}")[adapter_name], f"{key}.{fused_into(self.base_layer, name)[0]}")
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters or [adapter_name], inference_mode=inference_mode)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode=inference_mode or self.frozen)
        self._prepare_view()

    def enable_adapters(self, enabled: bool) -> None:
        # PEFT's own also resets requires_grad, which would thaw frozen layers after one pass of the teacher.
        self._disable_adapters = not enabled

    def delete_adapter(self, adapter_name: str) -> None:
        self.configs.pop(adapter_name, None)
        self._view = None
        super().delete_adapter(adapter_name)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise NotImplementedError("DSLA replaces a layer, it cannot be merged in place; merge_and_unload() returns the hybrid model")

    def unmerge(self) -> None:
        """Nothing was merged."""

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """The base attention, or if this layer is DSLA now and `merge` is set, an attention of its own that takes the
        adapter's weights over without a copy."""
        if not (merge and self.converted):
            return self.base_layer
        attention = self.dsla_attention()
        dtype = next(self.base_layer.parameters()).dtype
        for name, module in attention._modules.items():
            if isinstance(module, FusedProjection):
                module = module.merged()
            if isinstance(module, AdapterLinear):
                attention._modules[name] = _as_linear(module)
        attention.to(dtype)
        self._view = None
        return attention

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        module = next(module for module in base_layer.modules() if module._parameters)
        with align_module_device(module):  # offloaded weights lie on the meta device otherwise
            weight = next(module.parameters(recurse=False))
            return weight.device, weight.dtype


class DSLAModel(BaseTuner):
    """Wraps a model of transformers, such as a causal LM or its bare decoder; made by `get_peft_model(model, DSLAConfig(...))`."""

    prefix = "dsla_"
    tuner_layer_cls = DSLALayer
    target_module_mapping: dict[str, list[str]] = {}
    _warned_of_untrained = False

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
            _check_training(self.model, self.training)
        return self.model(*args, **kwargs)

    # --- levels -------------------------------------------------------------------------------------------------

    def set_level(self, level: int) -> None:
        """Run the first `level` layers of `conversion_order` as DSLA, from the next forward on. A cache of softmax layers
        is folded into states when a layer converted meets it.

        Raises:
            ValueError: if the plan has no such level.
        """
        set_level(self.model, level)

    def get_level(self) -> int:
        """How many layers of `conversion_order` run as DSLA."""
        return get_level(self.model)

    def set_conversion_order(self, order: list[int], scores: dict[int, float] | None = None) -> None:
        """Put the layers of the plan in another order, e.g. that of `rank_layers`; the level stays. Measurements per level are
        dropped if the order changes: a level is another set of layers then.

        Raises:
            ValueError: if `order` does not hold the same layers.
        """
        config = active_config(self.model)
        order = check_order(order)
        if set(order) != set(config.conversion_order or ()):
            raise ValueError(f"the order {order} must hold the layers that have DSLA weights: {sorted(config.conversion_order or ())}")
        if order != config.conversion_order:
            config.level_metrics = None
        config.conversion_order = order
        config.order_scores = None if scores is None else {str(layer): float(scores[layer]) for layer in order}

    @contextmanager
    def converted(self, layers: list[int]) -> Any:
        """Within the context, exactly `layers` run as DSLA: `with model.converted([5]): ...`."""
        config = active_config(self.model)
        plan, level = config.conversion_order or [], config.level
        if not set(layers) <= set(plan):
            raise ValueError(f"layers {sorted(set(layers) - set(plan))} have no DSLA weights; the plan is {plan}")
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
        """As in transformers, and with `level_policy`: a policy, its name such as "prompt-length", a level, or a `LevelProcessor`.
        Says once if layers that take part were never trained."""
        if not self._warned_of_untrained:
            self._warned_of_untrained = _warn_of_untrained(self.model, any_level=kwargs.get("level_policy") is not None)
        return generate_with_levels(self.model.generate, self.model, self, args, kwargs)

    def level_sizes(self) -> dict[str, int]:
        """Sizes that policies of `generate(level_policy=...)` reckon with."""
        plan = len(active_config(self.model).conversion_order or ())
        return {"min_level": 0, "max_level": plan, "num_layers": len(decoder_layers(self.model)), **layer_bytes(self.model)}

    # --- what PEFT asks of a tuner ------------------------------------------------------------------------------

    def _prepare_adapter_config(self, peft_config: DSLAConfig, model_config: dict) -> DSLAConfig:
        return peft_config

    @staticmethod
    def _check_target_module_exists(peft_config: DSLAConfig, key: str) -> Any:
        # PEFT finds the number of a layer only in names that have something before "layers", which those of a bare decoder lack.
        return BaseTuner._check_target_module_exists(peft_config, f".{key}" if key.startswith("layers.") else key)

    def _prepare_model(self, peft_config: DSLAConfig, model: nn.Module) -> None:
        """Checks before anything is changed; records the base in the config, or compares it with what is recorded."""
        _check_base(model)
        layers = decoder_layers(model)
        if peft_config.conversion_order is None:
            # Layers with a short sliding window of their own gain nothing: they stay, unless the plan names them.
            windows = [sliding_window_of(layer.self_attn) for layer in layers]
            peft_config.conversion_order = [i for i, window in enumerate(windows) if window is None or window > SHORT_WINDOW]
            if not peft_config.conversion_order:
                raise ValueError(
                    f"this model has a sliding window of {SHORT_WINDOW} tokens or fewer in every layer, so DSLA has nothing to gain; "
                    "name the layers in conversion_order to convert them all the same"
                )
            if peft_config.level is None:
                peft_config.level = 0  # as a new LoRA, a new adapter changes nothing
        peft_config.conversion_order = check_order(peft_config.conversion_order, len(layers))
        peft_config.level = peft_config.check_level(peft_config.level)
        for index in peft_config.conversion_order:
            layer = layers[index]
            if not any(hasattr(getattr(layer, name, None), "head_dim") for name in peft_config.target_modules or ()):
                raise ValueError(
                    f"target_modules {peft_config.target_modules} names no attention of layer {index}, whose modules are "
                    f"{[name for name, _ in layer.named_children()]}; leave target_modules out"
                )
            _check_readable(layer.self_attn, peft_config)
        base: Any = model.config
        if peft_config.base_model_type in (None, base.model_type):  # else the next line says that it is another base
            peft_config.take_rotary(base, base.model_type)
        _record_base(peft_config, model)

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
        if isinstance(self.model, GenerationMixin):
            make_masks = getattr(type(self.model), "create_masks_for_generate", None)
            self.model.create_masks_for_generate = functools.partial(masks_with_padding, make_masks, decoder)
        if not hasattr(decoder, "_dsla_level_guard"):
            decoder._dsla_level_guard = decoder.register_forward_hook(_guard_level)
            decoder._dsla_training_guard = decoder.register_forward_pre_hook(_check_training_at_level_0)

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
            _check_finite(model)
        hybrid_class = None
        if config is not None and config.level:
            if is_tensor_parallel(model):
                raise ValueError(f"each process holds a part of base and adapter, which are merged whole: {MERGE_FIRST}")
            _check_full_precision(model)
            hybrid_class = hybrid_classes(config.base_model_type or "")[1]
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
        else:
            _become_hybrid(model, hybrid_class, config)
        return model


register_peft_method(name="dsla", config_cls=DSLAConfig, model_cls=DSLAModel, prefix="dsla_")


# --- levels of any model that has DSLA layers -------------------------------------------------------------------


def dsla_layers(model: nn.Module) -> dict[int, DSLALayer]:
    """The wrapped layers of a model by layer number."""
    return {module.layer_idx: module for module in model.modules() if isinstance(module, DSLALayer)}


def active_config(model: nn.Module) -> DSLAConfig:
    """The config of the active DSLA adapter, also of one that transformers' `load_adapter` put in.

    Raises:
        ValueError: if the model has none.
    """
    for layer in model.modules():  # up to the first that tells: policies ask after every token, and all modules take milliseconds
        if isinstance(layer, DSLALayer) and layer.adapter_name is not None:
            return layer.configs[layer.adapter_name]
    raise ValueError(f"{type(model).__name__} has no active DSLA adapter: make one with get_peft_model(model, DSLAConfig(...))")


def set_level(model: nn.Module, level: int) -> None:
    """Run the first `level` layers of the plan as DSLA. See `DSLAModel.set_level`."""
    config = active_config(model)
    config.level = config.check_level(level)


def get_level(model: nn.Module) -> int:
    """How many layers of the plan run as DSLA."""
    return active_config(model).level or 0


# --- helpers ----------------------------------------------------------------------------------------------------


def _new_view(base: Any, modules: dict[str, nn.Module | None]) -> nn.Module:
    cls = dsla_attention_class(base.__class__)
    view = cls.__new__(cls)
    nn.Module.__init__(view)
    # accelerate puts hooked forwards into instance dicts: the view runs its class's own.
    own = {*view.__dict__, "forward", "_old_forward", "_hf_hook"}
    view.__dict__.update({name: value for name, value in base.__dict__.items() if name not in own})
    view._modules, view._parameters, view._buffers = dict(modules), base._parameters, base._buffers
    view.config = attention_config(base.config)
    return view


def _own_projections(base: Any, own: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The base's modules that are replaced when DSLA has these projections of its own."""
    replaced: dict[str, nn.Module] = {}
    for name, module in own.items():
        matrix, parts = fused_into(base, name)
        if parts == (name,):
            replaced[name] = module
        elif matrix not in replaced:
            bounds = [projection(base, part)[1] for part in parts]
            mine: dict[str, Any] = {part: own[part] for part in parts if part in own}
            replaced[matrix] = FusedProjection(getattr(base, matrix), parts, [rows.stop - rows.start for rows in bounds], mine)
    return replaced


def _copy_linear(linear: nn.Linear, rows: slice) -> AdapterLinear:
    """A trainable copy of some rows, in full precision if the original is quantised; on the meta device if the original is there,
    or where PEFT makes empty weights (`low_cpu_mem_usage`)."""
    with align_module_device(linear):  # offloaded weights are brought in for as long as it takes
        weight: Any = dequantised(linear)
        device = "meta" if weight.device.type == "meta" else None
        size = len(range(*rows.indices(linear.out_features)))
        copy = AdapterLinear(linear.in_features, size, bias=linear.bias is not None, dtype=weight.dtype, device=device)
        if copy.weight.device.type != "meta":
            values = {"weight": weight} if linear.bias is None else {"weight": weight, "bias": linear.bias}
            copy.load_state_dict({name: whole(value.detach())[rows] for name, value in values.items()})
    return copy


def _as_linear(linear: AdapterLinear) -> nn.Linear:
    plain = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
    plain.weight, plain.bias = linear.weight, linear.bias
    return plain


def _check_finite(model: nn.Module) -> None:
    """Refuse a merge of broken weights, as `safe_merge` asks."""
    for layer in dsla_layers(model).values():
        name: Any = layer.adapter_name
        modules: Any = [getattr(layer, part) for part in layer.adapter_layer_names] if layer.converted else []
        if not all(p.isfinite().all() for module in modules if name in module for p in module[name].parameters()):
            raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken (layer {layer.layer_idx})")


def _become_hybrid(model: Any, hybrid_class: type, config: DSLAConfig) -> None:
    """Turn the base, whose converted layers are in place, into the hybrid class; the config object of the base stays as it was."""
    values = {name: value for name, value in model.config.to_dict().items() if name not in ("model_type", "architectures")}
    values.pop("quantization_config", None)  # of a file whose weights were dequantised as they were loaded
    dsla_config = config.to_hybrid_dict()
    if model.config._name_or_path:
        dsla_config.setdefault("base_model_name_or_path", model.config._name_or_path)
    hybrid_config = hybrid_class.config_class(**values, dsla_config=dsla_config)  # type: ignore[attr-defined]
    hybrid_config._attn_implementation = model.config._attn_implementation
    hybrid_config._experts_implementation = getattr(model.config, "_experts_implementation", None)
    base_config = model.config
    for module in model.modules():
        if getattr(module, "config", None) is base_config:
            module.config = hybrid_config
    model.__class__ = hybrid_class
    hybrid_config.architectures = [hybrid_class.__name__]
    name_model(model, "")  # it lies nowhere yet: whoever loads by name would get the base
    if (quantiser := getattr(model, "hf_quantizer", None)) is not None:
        quantiser.remove_quantization_config(model)


def _check_full_precision(model: Any) -> None:
    """Refuse a merge over quantised weights: a hybrid is made of whole ones."""
    quantiser = getattr(model, "hf_quantizer", None)
    method = getattr(getattr(quantiser, "quantization_config", None), "quant_method", None)
    name = quantised_weight(model)
    name = name and name.replace(".base_layer", "")
    if name is None and (quantiser is None or method == "gguf"):  # weights of a GGUF file that are not packed were dequantised
        return
    raise ValueError(
        f"the base is quantised ({name or 'by quantization_config'}), and a hybrid is made of weights in full precision: load the base "
        "without quantization_config, merge and save; then load the hybrid with quantization_config, or quantize_() it"
    )


def _check_readable(attention: Any, config: DSLAConfig) -> None:
    """Refuse a base of whose weights no trained copy can be made."""
    for name in config.trained_projections:
        linear = projection(attention, name)[0]
        if dequantised(linear) is None:
            raise ValueError(
                f"{name} of layer {attention.layer_idx} is a {type(linear).__name__}, whose weights DSLA cannot copy in full precision: "
                "load the base without quantization_config (a GGUF file: with GgufConfig(dequantize=True)), or in 4 or 8 bits by "
                "bitsandbytes or torchao"
            )


def _check_base(model: Any) -> None:
    if isinstance(model, (PeftModel, PeftMixedModel)):
        raise ValueError(
            f"this is a {type(model).__name__} already: a second DSLA adapter is added by model.add_adapter(name, DSLAConfig(...)); one of "
            "another PEFT method must be merged first, with merge_and_unload(), or taken off"
        )
    if getattr(getattr(model, "config", None), "model_type", None) not in SUPPORTED_BASES:
        raise ValueError(why_unsupported(getattr(model, "config", None)))
    if "disk" in getattr(model, "hf_device_map", {}).values():
        raise ValueError(
            "the base has layers on disk, over which PEFT cannot load an adapter that wraps whole attention modules: load the base in "
            "memory, or save a hybrid (merge_and_unload) and load that with the same device_map"
        )
    if cuts_heads(model):
        check_heads(getattr(model.config, "num_key_value_heads", None) or model.config.num_attention_heads, model.tp_size)
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and not isinstance(module, DSLALayer):
            raise ValueError(
                f"{name} carries another PEFT adapter ({type(module).__name__}): call merge_and_unload() on that one first, then convert"
            )


def _record_base(config: DSLAConfig, model: Any) -> None:
    """Write type, sizes and fingerprint of the base into a new config; compare them with those of a loaded one."""
    base = model.config
    first: Any = decoder_layers(model)[0]
    dimensions = {
        "num_hidden_layers": base.num_hidden_layers,
        "hidden_size": base.hidden_size,
        "num_attention_heads": base.num_attention_heads,
        "num_key_value_heads": getattr(base, "num_key_value_heads", None) or base.num_attention_heads,
        "head_dim": first.self_attn.head_dim,
    }
    layers: Any = decoder_layers(model)
    attention = {i: getattr(layers[i].self_attn, "base_layer", layers[i].self_attn) for i in config.conversion_order or ()}
    if config.base_model_type is None:
        config.base_model_type, config.base_dimensions, config.base_fingerprint = base.model_type, dimensions, fingerprint_of(attention)
        return
    for what, recorded, found in (
        ("model type", config.base_model_type, base.model_type),
        ("sizes", config.base_dimensions, dimensions),
    ):
        if recorded != found:
            raise ValueError(
                f"this DSLA adapter was made for another base model: its {what} {recorded}, this model's {found} "
                "(a DSLAConfig belongs to one base: make a new one for another)"
            )
    if config.base_fingerprint:
        check_base(config.base_fingerprint, attention, config.base_model_name_or_path, config.trained_projections)


def _check_training(model: nn.Module, training: bool) -> None:
    """Refuse a training forward in which no DSLA weight that is to be trained has a part, because all are of layers that are not DSLA now.
    PyTorch's error names no cause, and embeddings that require gradients for checkpointing, or other trained weights, hide even that."""
    if not (training and torch.is_grad_enabled()):
        return
    layers = dsla_layers(model)
    trained = {i: layer for i, layer in layers.items() if any(p.requires_grad for part in layer.adapter_parts() for p in part.parameters())}
    if not trained or any(layer.converted or layer.disable_adapters for layer in trained.values()):
        return
    raise RuntimeError(
        f"nothing of DSLA can be trained at level {get_level(model)}: the weights that require gradients are those of layers "
        f"{sorted(trained)}, which are not DSLA now (the plan is {active_config(model).conversion_order}). Call set_level(), or give "
        "DSLAConfig a level, before training; or use DSLATrainer without train_level, which draws a level for every step. A pass without "
        "gradients takes torch.no_grad(); to train other weights alone, call set_trainable_layers([])"
    )


def _check_training_at_level_0(decoder: nn.Module, args: Any) -> None:
    """A forward pre-hook of the decoder: there for every loss, also for adapters that transformers' `add_adapter` put in."""
    if decoder.training and torch.is_grad_enabled() and not any(layer.converted for layer in dsla_layers(decoder).values()):
        _check_training(decoder, True)


def _warn_of_untrained(model: nn.Module, any_level: bool) -> bool:
    """Say so if layers that are DSLA now, or at any level, were never trained; returns whether it was said."""
    untrained = [i for i, layer in dsla_layers(model).items() if (any_level or layer.converted) and layer.untrained]
    if untrained:
        logger.warning(
            f"the DSLA weights of layers {untrained} were never trained, so what is generated tells nothing of the method: distil them "
            "(`dsla distill`, `dsla_hf.distill`), or load trained ones with PeftModel.from_pretrained(base, adapter). Level 0 is the "
            "original model"
        )
    return bool(untrained)


def _guard_level(decoder: nn.Module, args: Any, output: Any) -> None:
    """Refuse a backward pass at another level than its forward: recomputed activations would belong to another model."""
    hidden = getattr(output, "last_hidden_state", output[0] if isinstance(output, tuple) else output)
    if not (torch.is_grad_enabled() and isinstance(hidden, Tensor) and hidden.requires_grad):
        return

    def converted() -> list[int]:
        return [index for index, layer in dsla_layers(decoder).items() if layer.converted]

    before = converted()

    def check(grad: Tensor) -> None:
        if (now := converted()) != before:
            raise RuntimeError(
                f"the level changed between forward and backward: layers {before} were DSLA, now {now} are. "
                "Change the level (or disable_adapter) only after backward()"
            )

    hidden.register_hook(check)
