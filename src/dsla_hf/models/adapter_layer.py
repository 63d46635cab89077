"""One layer under PEFT: the base's attention, and the weights of DSLA adapters over it.

`DSLALayer` wraps a base attention module and runs either it or a DSLA view of it. The view is a `DSLA...Attention` of
`base_attention` whose modules are the base's own (k, v, norms) and the adapter's (`dsla_*`); it is not registered as a child,
so no weight has two names. Whether the layer is DSLA is read from the config at every call: `level` lives there alone.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional as F

from ..compat import align_module_device, needed_for
from ..compat.attributes import children_of, parameters_of, view_of
from ..core.heads import HeadSplit
from ..core.tensor_parallel import FEATURE, is_tensor_parallel, whole
from .architectures import fused_into, projection, query_rows
from .base_attention import attention_config, dsla_attention_class, head_split, new_dual_state_attention
from .configuration import PROJECTIONS, DSLAConfig
from .mixed_projections import MixedColumns, MixedProjection, MixedRows
from .ordered_heads import HeadsInUse, OrderedHeads, cannot_be_ordered
from .quantised import dequantised


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
        self._ordered: tuple[Any, OrderedHeads, dict[int, Any]] | None = None  # what it is made of, and views by number of converted heads

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)  # the decoder may ask for attributes of its attention

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_view": None, "_ordered": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._prepare_view()

    @property
    def adapter_name(self) -> str | None:
        """The active adapter, if this layer has weights of it."""
        return next((name for name in self.active_adapters if name in self.configs), None)

    @property
    def converted_part(self) -> bool | tuple[int, ...]:
        """Whether this layer runs as DSLA now; where a part of it does, the KV heads that do."""
        name = self.adapter_name
        if name is None or self.disable_adapters:
            return False
        config = self.configs[name]
        if config.conversion_unit == "layer":
            return self.layer_idx in config.converted_layers
        heads = config.heads_of(self.layer_idx)
        return heads if 0 < len(heads) < config.kv_heads else bool(heads)

    @property
    def converted(self) -> bool:
        """Whether this layer, or some of its heads, runs as DSLA now."""
        return bool(self.converted_part)

    @property
    def untrained(self) -> bool:
        """Whether the active adapter's states in this layer are those of its start: training moves mix and norm at once."""
        if self.adapter_name is None:
            return False
        core: Any = self.dsla_core[self.adapter_name]
        if not core.states:
            return False
        with align_module_device(core):
            return not core.mix_logits.any() and bool((core.norm_weight == 1).all())

    def adapter_parts(self) -> list[nn.Module]:
        """The modules of the active adapter."""
        return [getattr(self, part)[self.adapter_name] for part in self.adapter_layer_names if self.adapter_name in getattr(self, part)]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._ordered is not None and self.training and torch.is_grad_enabled():
            self._ordered = None  # training needs the memory
        attention = self.running_attention()
        if attention is None:
            kwargs.pop("dsla_layout", None)
            return self.base_layer(*args, **kwargs)
        return attention(*args, **kwargs)

    def running_attention(self, in_order: bool = True) -> Any:
        """The DSLA attention that this layer runs now, as `dsla_attention` has it; None where it runs the base's."""
        part = self.converted_part
        return self.dsla_attention(part if isinstance(part, tuple) else None, in_order) if part else None

    def dsla_attention(self, heads: tuple[int, ...] | None = None, in_order: bool = True) -> nn.Module:
        """The DSLA attention of the active adapter over this base attention, sharing their weights; in these KV heads alone, if given.

        in_order: of heads that are the first of the plan, and where no gradient is asked for, it may have queries and outputs in the order
        of conversion (see `ordered_heads`); the same heads then give the same module, whose weights stay where they are, as long as nothing
        that it is made of is replaced.

        Raises:
            RuntimeError: if the active adapter has no weights for this layer.
        """
        name = self.adapter_name
        if name is None:
            raise RuntimeError(f"the active adapter {self.active_adapters} has no weights for layer {self.layer_idx}")
        own = {part: getattr(self, f"dsla_{part}")[name] for part in self.configs[name].trained_projections}
        # Views are rebuilt when a module was replaced, e.g. by quantisation.
        made_of: Any = (name, self.dsla_core[name], dict(children_of(self.base_layer)), own)
        view = None if heads is None or not in_order else self._ordered_view(made_of, heads)
        view = self._plain_view(made_of, heads) if view is None else view
        view.training = self.training
        return view

    def _plain_view(self, made_of: Any, heads: tuple[int, ...] | None) -> Any:
        """The attention with heads in the base's order."""
        name, _, _, own = made_of
        order = () if heads is None else self.configs[name].order_of(self.layer_idx)
        made_of = (*made_of, heads, order)
        if self._view is None or self._view[0] != made_of:
            split = None if heads is None else head_split(self.base_layer, heads, order)
            self._view = made_of, self._new_view(_own_projections(self.base_layer, own, split), split)
        return self._view[1]

    def _ordered_view(self, made_of: Any, heads: tuple[int, ...]) -> Any:
        """The attention with heads in order of conversion; None where they cannot be, or a gradient is asked for."""
        name, core, _, own = made_of
        order, converted = self.configs[name].order_of(self.layer_idx), len(heads)
        if torch.compiler.is_compiling() or set(order[:converted]) != set(heads) or cannot_be_ordered(self.base_layer, own) is not None:
            return None
        weight = projection(self.base_layer, "q_proj")[0].weight
        all_of = (*made_of, order, weight.device, weight.dtype)
        if self._ordered is None or self._ordered[0] != all_of:
            self._ordered = all_of, OrderedHeads(self.base_layer, own, core, order), {}
        _, buffers, views = self._ordered
        if buffers.trained:
            self._ordered = None
            return None
        buffers.refresh()
        if converted not in views:
            split, use = head_split(self.base_layer, heads, order), buffers.at(converted)
            view = views[converted] = self._new_view(_ordered_projections(self.base_layer, use), split)
            view.in_order(use.core)
            self._plain_view(made_of, heads)  # that of compiled steps, which cannot build it
        return views[converted]

    def _new_view(self, projections: dict[str, nn.Module], split: HeadSplit | None) -> Any:
        name = self.adapter_name
        assert name is not None
        children = {**children_of(self.base_layer), "dsla": self.dsla_core[name], **projections}
        base_class: Any = self.base_layer.__class__
        view = view_of(self.base_layer, dsla_attention_class(base_class), children)
        view.config, view.softmax_config, view.split = attention_config(self.base_layer.config), self.base_layer.config, split
        view.exact_fold = self.configs[name].exact_fold
        return view

    def cannot_be_ordered(self) -> str | None:
        """Why a level in which this layer is converted in part has no weights at addresses that stay, in words; None where it has."""
        name = self.adapter_name
        if name is None:
            return None
        own = {part: getattr(self, f"dsla_{part}")[name] for part in self.configs[name].trained_projections}
        return cannot_be_ordered(self.base_layer, own)

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
        self._view = self._ordered = None
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
        attention = self.running_attention(in_order=False) if merge else None
        if attention is None:
            return self.base_layer
        dtype = next(self.base_layer.parameters()).dtype
        for name, module in list(attention.named_children()):
            if isinstance(module, (FusedProjection, MixedProjection)):
                module = module.merged()
                setattr(attention, name, module)
            if isinstance(module, AdapterLinear):
                setattr(attention, name, _as_linear(module))
        name = self.adapter_name
        if attention.split is not None and name is not None:  # of other heads nothing is needed any more
            core = new_dual_state_attention(self.base_layer, self.configs[name], len(attention.split.converted))
            trained = any(x.requires_grad for x in attention.dsla.parameters())
            core.load_state_dict(attention.converted_core().state_dict(), assign=True)
            attention.dsla = core.requires_grad_(trained)
        attention.to(dtype)
        self._view = self._ordered = None
        return attention

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        module = next(module for module in base_layer.modules() if parameters_of(module))
        with align_module_device(module):  # offloaded weights lie on the meta device otherwise
            weight = next(module.parameters(recurse=False))
            return weight.device, weight.dtype


def _own_projections(base: Any, own: dict[str, nn.Module], split: HeadSplit | None = None) -> dict[str, nn.Module]:
    """The base's modules that are replaced when DSLA has these projections of its own, in the converted heads of a split layer alone."""
    replaced: dict[str, nn.Module] = {}
    for name, module in own.items():
        matrix, parts = fused_into(base, name)
        if split is not None and name == "o_proj":
            replaced[matrix] = MixedColumns(getattr(base, matrix), module, split, base.head_dim)
        elif parts == (name,) and split is None:
            replaced[matrix] = module
        elif matrix not in replaced:
            linear = getattr(base, matrix)
            bounds = [projection(base, part)[1].indices(linear.out_features) for part in parts]
            sizes = [stop - start for start, stop, _ in bounds]
            mine: dict[str, Any] = {part: own[part] for part in parts if part in own}
            if split is None:
                replaced[matrix] = FusedProjection(linear, parts, sizes, mine)
            else:
                replaced[matrix] = MixedRows(linear, parts, sizes, mine, split, base.head_dim, query_rows(base))
    return replaced


def _ordered_projections(base: Any, use: HeadsInUse) -> dict[str, nn.Module]:
    """The base's modules that are replaced where heads lie in order of conversion."""
    queries = _linear_over(use.q_weight, use.q_bias)
    outputs = _linear_over(use.o_weight, projection(base, "o_proj")[0].bias)
    matrix, parts = fused_into(base, "q_proj")
    fused = None
    if parts != ("q_proj",):
        linear = getattr(base, matrix)
        bounds = [projection(base, part)[1].indices(linear.out_features) for part in parts]
        fused = FusedProjection(linear, parts, [stop - start for start, stop, _ in bounds], {"q_proj": queries})
    replaced: dict[str, nn.Module] = {matrix: queries if fused is None else fused, fused_into(base, "o_proj")[0]: outputs}
    if use.q_norm is not None:
        replaced["q_norm"] = view_of(base.q_norm, type(base.q_norm), {}, {"weight": use.q_norm})
    return replaced


def _linear_over(weight: Tensor, bias: Tensor | None) -> AdapterLinear:
    """A linear layer that reads these tensors where they lie."""
    linear: Any = AdapterLinear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
    return linear


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
