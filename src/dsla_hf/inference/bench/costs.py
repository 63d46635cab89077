"""What a token and a prompt cost at least, by bytes and operations: the predictions that `dsla bench` prints beside what it measures.

    seconds per token = (weights + keys and values + states) / copy bandwidth
    seconds of a prompt = operations / rate of a large matrix product

    weights             every weight that a forward multiplies with, once: decoder layers as they run at this level, final norm and
                        output matrix; of the embedding only rows are read, which are not counted
    keys and values     of each KV head that is softmax attention: rows × tokens × bytes per token
    states              of each row and the Hkv heads of a layer that are DSLA, with Z = 8 Hkv K V bytes of both fp32 states (0 of a window
                        alone) and e bytes per token of their k and v:
                        with a window  Z (1 + 4 / W) + e (W + S + 1): states and window are read; a block goes into the states
                                       every W / 2 tokens
                        without        2 Z: read and written
    operations          of a prompt of T tokens a row: 2 T per weight of the decoder layers, 2 per weight of the output matrix (one
                        logit); and of each layer's attention, by Hq query heads that read heads of this kind
                        softmax        2 Hq (K + V) T² / 2
                        DSLA           T (Hq (n P + 4 K V) + 8 Hkv K V), P = 2 (W + 64) K, n = 2 with a window and 3 without
                                       of a window alone T Hq 2 P

A layer converted in part costs what its kept heads and its converted heads do, and its projections once.
Launches, norms, activations and everything else that a GPU also does cost nothing here: predictions are floors, not estimates.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...core.attention import DualStateAttention
from ...models.architectures import kv_heads_of
from ...models.decoder import attentions_of, decoder_layers, decoder_of
from ...models.mixed_projections import MixedProjection
from ...models.sizes import core_bytes
from ..graph import dsla_attention_of

CHUNK = 64  # tokens that the states take in at a time


@dataclass(frozen=True)
class Costs:
    """Sizes of a model at one level, and what follows from them; bytes and operations."""

    weight_bytes: int
    layer_weights: int  # elements
    head_weights: int
    kept_heads: int  # KV heads of all layers that are softmax attention
    queries: int  # query heads of each KV head
    key_dim: int
    itemsize: int  # bytes of a number in k and v
    cores: tuple[DualStateAttention, ...]  # of the layers with DSLA, each of its converted heads

    @property
    def bytes_per_token(self) -> int:
        """Bytes of k and v of one KV head, per row."""
        return 2 * self.key_dim * self.itemsize

    def cache_bytes(self, rows: int, tokens: int) -> int:
        """Bytes of a cache that holds `tokens` tokens a row."""
        states = sum(core_bytes(core, core.num_kv_heads, self.itemsize)["dsla_bytes"] for core in self.cores)
        return rows * (self.kept_heads * tokens * self.bytes_per_token + states)

    def token_bytes(self, rows: int, tokens: int) -> float:
        """Bytes that one step moves for rows that have `tokens` tokens behind them."""
        kv = self.kept_heads * (tokens + 1) * self.bytes_per_token
        return self.weight_bytes + rows * (kv + sum(self._step_bytes(core) for core in self.cores))

    def prompt_operations(self, rows: int, tokens: int) -> float:
        """Operations that reading prompts of `tokens` tokens takes."""
        softmax = 2 * self.kept_heads * self.queries * 2 * self.key_dim * tokens**2 / 2
        dsla = sum(tokens * self._token_operations(core) for core in self.cores)
        return rows * (2 * tokens * self.layer_weights + 2 * self.head_weights + softmax + dsla)

    def _step_bytes(self, core: DualStateAttention) -> float:
        if not core.window_size:
            return 2 * _both_states(core)
        window = (core.window_size + core.sink_tokens + 1) * core.num_kv_heads * self.bytes_per_token
        return _both_states(core) * (1 + 4 / core.window_size) + window

    @staticmethod
    def _token_operations(core: DualStateAttention) -> float:
        met = 2 * (core.window_size + CHUNK) * core.key_dim
        state = core.key_dim * core.value_dim if core.states else 0
        products = 2 if core.window_size else 3
        return core.num_heads * (products * met + 4 * state) + 8 * core.num_kv_heads * state


@torch.no_grad()  # as steps run: where gradients are asked for, a layer converted in part gives up the buffers that they read
def costs_of(model: Any) -> Costs:
    """The costs of a causal LM, an adapter or a hybrid at the level it has now."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = base.config.get_text_config(decoder=True)
    kv_heads = kv_heads_of(config)
    weights: dict[int, Tensor] = {}
    cores, kept = [], 0
    attentions: list[Any] = attentions_of(base)
    for layer, attention in zip(decoder_layers(base), attentions, strict=True):
        if attention is None:  # a layer of the base that is linear already, or mixes no tokens
            weights |= {id(p): p for p in layer.parameters()}
            continue
        runs = dsla_attention_of(layer)
        if runs is None:
            kept += kv_heads
            read = getattr(attention, "base_layer", attention).parameters()
        else:
            kept += 0 if runs.split is None else len(runs.split.kept)
            cores.append(runs.converted_core())
            read = _weights_read(runs, cores[-1])
        others = {id(p) for p in attention.parameters()}
        weights |= {id(p): p for p in layer.parameters() if id(p) not in others}
        weights |= {id(p): p for p in read}
    in_layers = sum(p.numel() for p in weights.values())
    head = base.get_output_embeddings().weight
    norm = getattr(decoder_of(base), "norm", nn.Identity())
    weights |= {id(p): p for p in (head, *norm.parameters())}
    return Costs(
        weight_bytes=sum(map(stored_bytes, weights.values())),
        layer_weights=in_layers,
        head_weights=head.numel(),
        kept_heads=kept,
        queries=config.num_attention_heads // kv_heads,
        key_dim=next(attention.head_dim for attention in attentions if attention is not None),
        itemsize=base.dtype.itemsize,
        cores=tuple(cores),
    )


def _weights_read(attention: Any, core: DualStateAttention) -> Iterator[Tensor]:
    """The weights that a DSLA attention reads, whose converted heads are `core`."""
    yield from core.parameters()
    for name, module in attention.named_children():
        if isinstance(module, MixedProjection):
            yield from (p for linear in module.linears_read() for p in linear.parameters())
        elif name != "dsla":  # there it has what is DSLA's own, of kept heads too
            yield from module.parameters()
    yield from attention.parameters(recurse=False)


def stored_bytes(weight: torch.Tensor) -> int:
    """Bytes that a weight takes; of a quantised one those of its parts, of a sharded one those that lie here."""
    if not hasattr(weight, "__tensor_flatten__"):
        return weight.numel() * weight.element_size()
    parts, _ = weight.__tensor_flatten__()
    return sum(stored_bytes(getattr(weight, part)) for part in parts)


def _both_states(core: DualStateAttention) -> int:
    return core.num_states * core.num_kv_heads * core.key_dim * core.value_dim * 4


# --- what the machine can do ------------------------------------------------------------------------------------


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of a copy too large for caches."""
    size = 2**30 if device.type == "cuda" else 2**26
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _seconds(lambda: target.copy_(source), device)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a large matrix product."""
    size = 8192 if device.type == "cuda" else 512
    a = torch.randn(size, size, device=device, dtype=dtype)
    return 2 * size**3 / _seconds(lambda: a @ a, device)


def _seconds(run: Callable[[], Any], device: torch.device, repeats: int = 7) -> float:
    times = []
    for _ in range(repeats + 2):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
