"""Argument checks shared by every implementation: a wrong input is named before anything runs."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .shapes import Argument, check, check_groups, table

# A chunk of 64 tokens at this log-decay reaches exp(-80), which fp32 and bf16 still hold; the bound is part of the contract.
SMALLEST_LOG_DECAY = -1.25
LARGEST_HEAD = 256  # channels that the Triton kernels take
LARGEST_RANK = 64  # of the map from values to gates
MOST_ROWS = 16  # of x, that the kernels for linear layers take
MOST_WEIGHTS = 3  # of one launch: queries, keys and values
ACTIVATIONS = ("silu", "gelu_tanh")


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
) -> None:
    """Raises ValueError that names the argument which does not fit the contract of `dual_state_attention`."""
    check_lower_bound(lower_bound)
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise ValueError(f"q, k, v must be [B, T, H, D], got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}")
    batch, tokens, heads, key_dim = q.shape
    kv_heads = k.shape[2]
    if tokens == 0:
        raise ValueError("q holds no tokens (T = 0)")
    if k.shape != (batch, tokens, kv_heads, key_dim):
        raise ValueError(f"k must be [{batch}, {tokens}, Hkv, {key_dim}] to fit q {list(q.shape)}, got {list(k.shape)}")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v must be [{batch}, {tokens}, {kv_heads}, V] to fit k {list(k.shape)}, got {list(v.shape)}")
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"the {heads} query heads must be a multiple of the {kv_heads} key-value heads")
    if gate_logits.shape[:-1] != (batch, tokens, kv_heads, 2) or gate_logits.shape[-1] not in (key_dim, key_dim / 2):
        raise ValueError(
            f"gate_logits must be [{batch}, {tokens}, {kv_heads}, 2, G] with G = {key_dim} or {key_dim / 2:g}, "
            f"got {list(gate_logits.shape)}"
        )
    if write_logits is not None and (write_logits.shape != (batch, tokens, kv_heads, 2) or write_logits.device != q.device):
        raise ValueError(
            f"write_logits must be [{batch}, {tokens}, {kv_heads}, 2] on {q.device}, "
            f"got {list(write_logits.shape)} on {write_logits.device}"
        )
    if mix.shape != (heads, 2):
        raise ValueError(f"mix must be [{heads}, 2] (query heads, states), got {list(mix.shape)}")
    if not (q.dtype == k.dtype == v.dtype) or not q.is_floating_point():
        raise ValueError(f"q, k, v must share one floating-point dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if not (q.device == k.device == v.device == gate_logits.device == mix.device):
        raise ValueError(f"all inputs must be on one device, got {[str(x.device) for x in (q, k, v, gate_logits, mix)]}")
    if padding_mask is not None and padding_mask.shape != (batch, tokens):
        raise ValueError(f"padding_mask must be [{batch}, {tokens}], got {list(padding_mask.shape)}")
    if cu_seqlens is not None and (batch != 1 or padding_mask is not None or cu_seqlens.ndim != 1 or cu_seqlens.numel() < 2):
        raise ValueError("cu_seqlens (1-D, at least two entries) needs one batch row and no padding_mask")
    rows = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    expected = (rows, kv_heads, 2, key_dim, v.shape[-1])
    if initial_state is not None and initial_state.shape != expected:
        raise ValueError(f"initial_state must be {list(expected)}, got {list(initial_state.shape)}")


def check_window_inputs(
    k: Tensor, v: Tensor, sinks: tuple[Tensor, Tensor] | None, row_start: Tensor | None, state_mask: Tensor | None
) -> None:
    """Raises ValueError that names what does not fit the contract of `dual_state_window_attention` beyond `check_inputs`."""
    for name, x, like in zip(("k", "v"), sinks or (), (k, v), strict=False):
        if x.ndim != 4 or (x.shape[0], *x.shape[2:]) != (like.shape[0], *like.shape[2:]) or x.dtype != like.dtype:
            raise ValueError(
                f"{name} of the sinks must be {like.dtype} [{like.shape[0]}, S, {like.shape[2]}, {like.shape[3]}], "
                f"got {x.dtype} {list(x.shape)}"
            )
    if row_start is not None and (row_start.shape != k.shape[:1] or row_start.is_floating_point()):
        raise ValueError(f"row_start must be whole numbers [{k.shape[0]}], got {row_start.dtype} {list(row_start.shape)}")
    if state_mask is not None and state_mask.shape != k.shape[:2]:
        raise ValueError(f"state_mask must be {list(k.shape[:2])}, got {list(state_mask.shape)}")


def _softmax(q: str, keys: str, others: dict[str, str]) -> tuple[Argument, ...]:
    lines = {"q": f"{q} Hq D; floating-point", "keys": f"{keys} D; as q", "values": f"{keys} V; as q", "lengths": "B; int32 or int64"}
    return table(lines | others)


BLOCK_TABLE = {"block_table": "B most_blocks; int32 or int64"}
SINK_LOGITS = {"sink_logits": "Hq; floating-point; optional"}
SOFTMAX_DECODE = _softmax("B 1", "B Hkv T", {"mask": "B T; bool; optional"} | SINK_LOGITS)
PAGED_DECODE = _softmax("B 1", "blocks block_size Hkv", BLOCK_TABLE | SINK_LOGITS)
SOFTMAX_PROMPT = _softmax("B T", "blocks block_size Hkv", BLOCK_TABLE | {"starts": "B; as lengths"})


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
) -> None:
    """Raises ValueError that names the argument which does not fit the contract of `softmax_decode`."""
    given = {"q": q, "keys": keys, "values": values, "lengths": lengths, "sink_logits": sink_logits}
    if block_table is None:
        sizes = check(SOFTMAX_DECODE, given | {"mask": mask})
        room = sizes["T"]
    elif mask is not None:
        raise ValueError("mask goes with keys [B, Hkv, T, D], not with a block_table: leave padding out of the blocks")
    else:
        sizes = check(PAGED_DECODE, given | {"block_table": block_table})
        room = sizes["block_size"] * sizes["most_blocks"]
    _check_softmax(sizes, room, window)
    check_softcap(softcap)


def check_softmax_prompt_inputs(
    q: Tensor, keys: Tensor, values: Tensor, starts: Tensor, lengths: Tensor, block_table: Tensor, window: int | None = None
) -> None:
    """Raises ValueError that names the argument which does not fit the contract of `softmax_prompt`."""
    given = {"q": q, "keys": keys, "values": values, "lengths": lengths, "block_table": block_table, "starts": starts}
    sizes = check(SOFTMAX_PROMPT, given)
    if sizes["T"] == 0:
        raise ValueError(f"q must be [B, T, Hq, D] with a token at least, got {list(q.shape)}")
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
) -> None:
    """Raises ValueError that names the argument which does not fit the contract of `gate_logits`."""
    if v.ndim != 4 or not v.is_floating_point():
        raise ValueError(f"v must be floating-point [B, T, Hkv, V], got {v.dtype} {list(v.shape)}")
    kv_heads, value_dim = v.shape[2:]
    if gate_down.ndim != 3 or gate_down.shape[:2] != (kv_heads, value_dim):
        raise ValueError(f"gate_down must be [{kv_heads}, {value_dim}, rank] to fit v {list(v.shape)}, got {list(gate_down.shape)}")
    if gate_bias.ndim != 3 or gate_bias.shape[:2] != (kv_heads, 2):
        raise ValueError(f"gate_bias must be [{kv_heads}, 2, G] (KV heads, states, decays a state), got {list(gate_bias.shape)}")
    if (write_weight is None) != (write_bias is None):
        raise ValueError("write_weight and write_bias must be given together, or neither for a layer without write gates")
    rank, decays = gate_down.shape[-1], gate_bias.shape[-1]
    for name, x, shape in (
        ("gate_down", gate_down, (kv_heads, value_dim, rank)),
        ("gate_up", gate_up, (kv_heads, rank, 2 * decays)),
        ("gate_bias", gate_bias, (kv_heads, 2, decays)),
        ("write_weight", write_weight, (kv_heads, value_dim, 2)),
        ("write_bias", write_bias, (kv_heads, 2)),
    ):
        if x is not None and (x.shape != shape or not x.is_floating_point() or x.device != v.device):
            raise ValueError(
                f"{name} must be floating-point {list(shape)} on {v.device}, as v, gate_down and gate_bias have it, "
                f"got {x.dtype} {list(x.shape)} on {x.device}"
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
            if tensor is not x and not tensor.is_contiguous():
                raise ValueError(f"{name} {number} must be contiguous, got strides {tensor.stride()}")
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
