"""Argument checks shared by every implementation: a wrong input is named before anything runs."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .shapes import KERNEL_DTYPES, Argument, Tables, check, check_groups, table, two_tables

# A chunk of 64 tokens at this log-decay reaches exp(-80), which fp32 and bf16 still hold; the bound is part of the contract.
SMALLEST_LOG_DECAY = -1.25
LARGEST_HEAD = 256  # channels that the Triton kernels take
LARGEST_RANK = 64  # of the map from values to gates
MOST_ROWS = 16  # of x, that the kernels for linear layers take
MOST_WEIGHTS = 3  # of one launch: queries, keys and values
ACTIVATIONS = ("silu", "gelu_tanh")


def _states(dtypes: str) -> dict[str, str]:
    return {
        "k": f"B T Hkv K; {dtypes}",
        "v": "B T Hkv V; as k",
        "gate_logits": f"B T Hkv 2 G; {dtypes}",
        "write_logits": f"B T Hkv 2; {dtypes}; optional",
        "padding_mask": "B T; optional",
        "initial_state": f"N Hkv 2 K V; {dtypes}; optional",
    }


def _layer(dtypes: str) -> dict[str, str]:
    queries = {"q": f"B T Hq K; {dtypes}"} | _states(dtypes) | {"k": "B T Hkv K; as q", "v": "B T Hkv V; as q"}
    return queries | {"mix": f"Hq 2; {dtypes}; (query heads, states)", "cu_seqlens": "boundaries; optional"}


def _gates(dtypes: str) -> dict[str, str]:
    return {
        "v": f"B T Hkv V; {dtypes}",
        "gate_down": f"Hkv V rank; {dtypes}",
        "gate_up": f"Hkv rank columns; {dtypes}",  # 2 G
        "gate_bias": f"Hkv 2 G; {dtypes}",
        "write_weight": f"Hkv V 2; {dtypes}; optional",
        "write_bias": f"Hkv 2; {dtypes}; optional",
    }


_WINDOW = {
    "q": "B T Hq K",
    "k": "B T Hkv K",
    "v": "B T Hkv V",
    "k of the sinks": "B S Hkv K; as q; optional",
    "v of the sinks": "B S Hkv V; as q; optional",
    "row_start": "B; int32 or int64; optional",
    "state_mask": "B T; optional",
}
SINK_LOGITS = {"sink_logits": "Hq; floating-point; optional; (one a query head)"}
LAYER, KERNEL_LAYER = (two_tables(_layer(dtypes)) for dtypes in ("floating-point", KERNEL_DTYPES))
STATES, KERNEL_STATES = (two_tables(_states(dtypes)) for dtypes in ("floating-point", KERNEL_DTYPES))
GATES, KERNEL_GATES = (two_tables(_gates(dtypes)) for dtypes in ("floating-point", KERNEL_DTYPES))
WINDOW = two_tables(_WINDOW | SINK_LOGITS)
_ALONE = {name: line for name, line in _WINDOW.items() if name != "state_mask"} | {"padding_mask": "B T; optional"}
WINDOW_ALONE, KERNEL_WINDOW_ALONE = (
    two_tables(
        _ALONE
        | {"q": f"B T Hq K; {dtypes}", "k": "B T Hkv K; as q", "v": "B T Hkv V; as q"}
        | {"sink_logits": f"Hq; {dtypes}; optional; (one a query head)"}
    )
    for dtypes in ("floating-point", KERNEL_DTYPES)
)
FUSED_WINDOW = two_tables(
    _WINDOW
    | {"norm_weight": f"Hq V; {KERNEL_DTYPES}"}
    | dict.fromkeys(("state_gain", "state_bias"), f"Hq; {KERNEL_DTYPES}")
    | {"sink_logits": f"Hq; {KERNEL_DTYPES}; optional; (one a query head)"}
)


def check_lower_bound(lower_bound: float) -> None:
    """Raises ValueError if a log-decay bound lies outside [-1.25, 0)."""
    if not SMALLEST_LOG_DECAY <= lower_bound < 0:
        raise ValueError(
            f"lower_bound must lie in [{SMALLEST_LOG_DECAY}, 0): the chunked form needs 64 * lower_bound >= -80; got {lower_bound}"
        )


def check_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate_logits: Tensor,
    mix: Tensor,
    lower_bound: float,
    padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    write_logits: Tensor | None = None,
    kv_heads: Tensor | None = None,
    *,
    tables: Tables = LAYER,
) -> None:
    """Raises ValueError that names the argument which does not fit the contract of `dual_state_attention`."""
    check_lower_bound(lower_bound)
    if cu_seqlens is not None and (_rows(q) != 1 or padding_mask is not None or cu_seqlens.ndim != 1 or cu_seqlens.numel() < 2):
        raise ValueError("cu_seqlens (1-D, at least two entries) needs one batch row and no padding_mask")
    tensors = {
        "q": q,
        "k": k,
        "v": v,
        "gate_logits": gate_logits,
        "mix": mix,
        "write_logits": write_logits,
        "padding_mask": padding_mask,
        "cu_seqlens": cu_seqlens,
        "initial_state": initial_state,
        "kv_heads": kv_heads,
    }
    # A state a sequence, of which a batch has one a row.
    sizes = check(tables[int(kv_heads is not None)], tensors, N=_rows(q) if cu_seqlens is None else cu_seqlens.numel() - 1)
    check_groups(sizes["Hq"], sizes["Hkv"])
    _check_sizes(sizes, "q")


def _rows(x: Tensor | None) -> int:
    """Of a batch `[B, T, H, D]`; 1 for anything else, which the table refuses."""
    return x.shape[0] if x is not None and x.ndim == 4 else 1


def _check_sizes(sizes: dict[str, int], first: str) -> None:
    """What a table cannot say."""
    if sizes["T"] == 0:
        raise ValueError(f"{first} holds no tokens (T = 0)")
    if sizes["G"] not in (sizes["K"], sizes["K"] / 2):
        raise ValueError(f"gate_logits must have G = {sizes['K']} or {sizes['K'] / 2:g} decays a state, got {sizes['G']}")


def check_state_inputs(
    k: Tensor,
    v: Tensor,
    gate_logits: Tensor,
    block_size: int,
    lower_bound: float,
    padding_mask: Tensor | None,
    initial_state: Tensor | None,
    write_logits: Tensor | None,
    kv_heads: Tensor | None = None,
    *,
    tables: Tables = STATES,
) -> None:
    """Raises ValueError that names the argument which does not fit the contract of `block_states`."""
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    check_lower_bound(lower_bound)
    tensors = {
        "k": k,
        "v": v,
        "gate_logits": gate_logits,
        "write_logits": write_logits,
        "padding_mask": padding_mask,
        "initial_state": initial_state,
        "kv_heads": kv_heads,
    }
    _check_sizes(check(tables[int(kv_heads is not None)], tensors, N=_rows(k)), "k")


def check_kernel_inputs(
    q: Tensor, k: Tensor, v: Tensor, gate_logits: Tensor, mix: Tensor, gate_normalizer: float, lower_bound: float, *others: Tensor | None
) -> None:
    """As `check_inputs`, with its further arguments in `others`, and raises ValueError for what the Triton kernels do not take: other
    dtypes than fp32, bf16 and fp16, heads of more than 256 channels, a gate_normalizer that is not positive."""
    check_inputs(q, k, v, gate_logits, mix, lower_bound, *others, tables=KERNEL_LAYER)
    check_kernel_sizes(k, v, gate_normalizer)


def check_kernel_heads(k: Tensor, v: Tensor) -> None:
    """Raises ValueError if heads have more than 256 channels."""
    if max(k.shape[-1], v.shape[-1]) > LARGEST_HEAD:
        raise ValueError(f"the kernels take heads of up to {LARGEST_HEAD} channels, got K = {k.shape[-1]}, V = {v.shape[-1]}")


def check_kernel_sizes(k: Tensor, v: Tensor, gate_normalizer: float) -> None:
    """Raises ValueError if heads have more than 256 channels or gate_normalizer is not positive."""
    check_kernel_heads(k, v)
    if gate_normalizer <= 0:
        raise ValueError(f"gate_normalizer must be positive, got {gate_normalizer}")


def check_window_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_size: int,
    sinks: tuple[Tensor, Tensor] | None,
    softcap: float | None,
    *,
    kv_heads: Tensor | None = None,
    tables: Tables = WINDOW,
    **others: Tensor | None,
) -> None:
    """Raises ValueError that names what does not fit the contract of `dual_state_window_attention` beyond `check_inputs`; with
    `WINDOW_ALONE` and its like that of `window_attention`.

    others: row_start, sink_logits; state_mask or, of a window alone, padding_mask; with `FUSED_WINDOW` norm_weight, state_gain and
        state_bias.
    """
    if window_size < 2 or window_size % 2:
        raise ValueError(
            f"window_size must be an even number of tokens, got {window_size}; dual_state_attention is the form without a window"
        )
    check_softcap(softcap)
    sink_k, sink_v = sinks or (None, None)
    if sinks and (sink_k is None or sink_v is None):
        raise ValueError("sinks must be k and v, or None for a window without them")
    sinks_and_heads = {"k of the sinks": sink_k, "v of the sinks": sink_v, "kv_heads": kv_heads}
    sizes = check(tables[int(kv_heads is not None)], {"q": q, "k": k, "v": v, **sinks_and_heads, **others})
    check_groups(sizes["Hq"], sizes["Hkv"])
    if sizes["T"] == 0:
        raise ValueError("q holds no tokens (T = 0)")


def _softmax(q: str, keys: str, others: dict[str, str]) -> tuple[Argument, ...]:
    lines = {
        "q": f"{q} Hq D; floating-point",
        "keys": f"{keys} D; as q or fp8",
        "values": f"{keys} V; as keys",
        "lengths": "B; int32 or int64",
    }
    return table(lines | others)


BLOCK_TABLE = {"block_table": "B most_blocks; int32 or int64"}
HEADS = {"heads": "Hkv 2; int32; (of each KV head its table and its column in blocks)"}
BLOCK_TABLES = HEADS | {"block_table": "tables B most_blocks; int32 or int64; (one table more than a row's, as heads is given)"}
STARTS = {"starts": "B; as lengths"}
OF_DECODE = SINK_LOGITS | {"starts": "B; int32 or int64; optional; (tokens of each row before the queries)"}
MASK = {"mask": "B T; bool; optional; (True at tokens that are seen)"}
SOFTMAX_DECODE = _softmax("B queries", "B Hkv T", MASK | OF_DECODE)
SOFTMAX_DECODE_OF_HEADS = _softmax(
    "B queries", "B columns T", MASK | {"heads": "Hkv; int32; (of each KV head which of the keys)"} | OF_DECODE
)
PAGED_DECODE = _softmax("B queries", "blocks block_size Hkv", BLOCK_TABLE | OF_DECODE)
PAGED_DECODE_OF_HEADS = _softmax("B queries", "blocks block_size columns", BLOCK_TABLES | OF_DECODE)
SOFTMAX_PROMPT = _softmax("B T", "blocks block_size Hkv", BLOCK_TABLE | STARTS)
SOFTMAX_PROMPT_OF_HEADS = _softmax("B T", "blocks block_size columns", BLOCK_TABLES | STARTS)


def check_softmax_decode_inputs(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    window: int | None = None,
    block_table: Tensor | None = None,
    mask: Tensor | None = None,
    heads: Tensor | None = None,
    starts: Tensor | None = None,
    sink_tokens: int = 0,
    whole_heads: int = 0,
) -> None:
    """Raises ValueError that names the argument which does not fit the contract of `softmax_decode`."""
    given = {"q": q, "keys": keys, "values": values, "lengths": lengths, "sink_logits": sink_logits, "starts": starts}
    if block_table is None:
        if heads is not None and heads.ndim == 2:
            raise ValueError("heads [Hkv, 2] goes with block tables [tables, B, most blocks]: give block_table, or heads [Hkv]")
        lines = SOFTMAX_DECODE if heads is None else SOFTMAX_DECODE_OF_HEADS
        sizes = check(lines, given | {"mask": mask, "heads": heads})
        room = sizes["T"]
    elif mask is not None:
        raise ValueError("mask goes with keys [B, Hkv, T, D], not with a block_table: leave padding out of the blocks")
    else:
        lines = PAGED_DECODE if heads is None else PAGED_DECODE_OF_HEADS
        sizes = check(lines, given | {"block_table": block_table, "heads": heads})
        room = sizes["block_size"] * sizes["most_blocks"]
    _check_queries(q, sizes["queries"])
    _check_softmax(sizes, room, window)
    check_softcap(softcap)
    for name, value, most in (("sink_tokens", sink_tokens, None), ("whole_heads", whole_heads, sizes["Hkv"])):
        if value < 0 or (most is not None and value > most):
            raise ValueError(f"{name} must be 0 or more{'' if most is None else f', and {most} at most, the KV heads'}, got {value}")
        if value and window is None:
            raise ValueError(f"{name}={value} goes with a window: without one every head sees all tokens")


def _check_queries(q: Tensor, queries: int) -> None:
    if queries == 0:
        raise ValueError(f"q must be [B, T, Hq, D] with a token at least, got {list(q.shape)}")


def check_softmax_prompt_inputs(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: Tensor,
    lengths: Tensor,
    block_table: Tensor,
    window: int | None = None,
    heads: Tensor | None = None,
) -> None:
    """Raises ValueError that names the argument which does not fit the contract of `softmax_prompt`."""
    given = {"q": q, "keys": keys, "values": values, "lengths": lengths, "block_table": block_table, "starts": starts, "heads": heads}
    sizes = check(SOFTMAX_PROMPT if heads is None else SOFTMAX_PROMPT_OF_HEADS, given)
    _check_queries(q, sizes["T"])
    _check_softmax(sizes, sizes["block_size"] * sizes["most_blocks"], window)


def _check_softmax(sizes: dict[str, int], room: int, window: int | None) -> None:
    check_groups(sizes["Hq"], sizes["Hkv"])
    if sizes["B"] == 0:
        raise ValueError("q holds no rows (B = 0)")
    if room == 0:
        raise ValueError("keys must have room for a token at least, and a block_table a column")
    if window is not None and window <= 0:
        raise ValueError(f"window must be positive, or None for attention without it, got {window}")


def check_softmax_kernel_inputs(q: Tensor, keys: Tensor, values: Tensor) -> None:
    """Raises ValueError where the kernels of `softmax_decode` and `softmax_prompt` take less than their references do."""
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"the kernels take fp32, bf16 and fp16, got {q.dtype}")
    if max(q.shape[-1], values.shape[-1]) > LARGEST_HEAD:
        raise ValueError(
            f"the kernels take heads of up to {LARGEST_HEAD} channels, got {q.shape[-1]} for keys and {values.shape[-1]} for values"
        )
    for name, x in (("keys", keys), ("values", values)):
        if x.stride(-1) != 1:
            raise ValueError(f"{name} must be dense in the last dimension, got strides {x.stride()}; call contiguous() on them")


def check_gate_inputs(
    v: Tensor,
    gate_down: Tensor,
    gate_up: Tensor,
    gate_bias: Tensor,
    write_weight: Tensor | None = None,
    write_bias: Tensor | None = None,
    kv_heads: Tensor | None = None,
    *,
    tables: Tables = GATES,
) -> None:
    """Raises ValueError that names the argument which does not fit the contract of `gate_logits`."""
    if (write_weight is None) != (write_bias is None):
        raise ValueError("write_weight and write_bias must be given together, or neither for a layer without write gates")
    weights = {"gate_down": gate_down, "gate_up": gate_up, "gate_bias": gate_bias, "write_weight": write_weight, "write_bias": write_bias}
    check(tables[int(kv_heads is not None)], {"v": v, "kv_heads": kv_heads, **weights}, columns=2 * gate_bias.shape[-1:].numel())


def check_no_gradient_of_heads(kv_heads: Tensor | None, *tensors: Tensor | None) -> None:
    """Raises ValueError where a gradient is asked for of kernels that read `kv_heads` out of all heads of a layer."""
    if kv_heads is not None and torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        raise ValueError(
            "with kv_heads the kernels have no gradient: give them k.index_select(2, kv_heads) and v.index_select(2, kv_heads) instead, or "
            "call them under torch.no_grad()"
        )


def check_linears_inputs(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> None:
    """Raises ValueError that names the argument which the kernels for linear layers of few rows do not take."""
    rows = x.numel() // max(x.shape[-1], 1) if x.ndim else 0
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"x must be fp32, bf16 or fp16, got {x.dtype}")
    if not 1 <= rows <= MOST_ROWS:
        raise ValueError(f"x must have 1 to {MOST_ROWS} rows, got {rows} in {list(x.shape)}")
    if not 1 <= len(weights) <= MOST_WEIGHTS:
        raise ValueError(f"there must be 1 to {MOST_WEIGHTS} weights, got {len(weights)}")
    if len(biases) not in (0, len(weights)):
        raise ValueError(f"there must be a bias for each of the {len(weights)} weights, or none at all, got {len(biases)}")
    for number, weight in enumerate(weights):
        if weight.ndim != 2 or weight.shape[1] != x.shape[-1] or not weight.shape[0]:
            raise ValueError(f"weight {number} must be [N, {x.shape[-1]}] to fit x {list(x.shape)}, got {list(weight.shape)}")
    for number, bias in enumerate(biases):
        if bias.shape != weights[number].shape[:1]:
            raise ValueError(f"bias {number} must be [{weights[number].shape[0]}] as its weight, got {list(bias.shape)}")
    for name, tensors in (("x", [x]), ("weight", weights), ("bias", biases)):
        for number, tensor in enumerate(tensors):
            if tensor.dtype != x.dtype or tensor.device != x.device:
                raise ValueError(f"{name} {number} must be {x.dtype} on {x.device} as x is, got {tensor.dtype} on {tensor.device}")
            if name == "weight" and tensor.stride() != (tensors[0].stride(0), 1):
                far = f"strides {(tensors[0].stride(0), 1)}" + (" as weight 0 has" if number else ", with a dense last dimension")
                raise ValueError(f"weight {number} must have {far}, got {tensor.stride()}")
            if name == "bias" and not tensor.is_contiguous():
                raise ValueError(f"bias {number} must be contiguous, got strides {tensor.stride()}")
            if tensor.requires_grad and torch.is_grad_enabled():
                raise ValueError(f"{name} {number} requires a gradient, which these kernels do not have: call them under torch.no_grad()")


def check_gated_linear_inputs(x: Tensor, gate_weight: Tensor, up_weight: Tensor, activation: str) -> None:
    """Raises ValueError that names the argument which does not fit the contract of `gated_linear`."""
    if gate_weight.ndim != 2 or x.shape[-1:] != gate_weight.shape[1:]:
        raise ValueError(f"gate_weight must be [N, K] to fit x {list(x.shape)}, got {list(gate_weight.shape)}")
    if up_weight.shape != gate_weight.shape:
        raise ValueError(f"up_weight must be {list(gate_weight.shape)} as gate_weight is, got {list(up_weight.shape)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")


def check_softcap(softcap: float | None) -> None:
    """Raises ValueError if it is no cap of scores."""
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, or None for no cap, got {softcap}")
