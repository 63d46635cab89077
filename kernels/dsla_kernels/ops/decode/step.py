"""A token through the layer, for callers: the weights of its gates, what each argument must be, and the forms of the layer."""

from typing import NamedTuple

from torch import Tensor

from ..._ops import ops
from ...checks import LARGEST_HEAD, SMALLEST_LOG_DECAY, check_softcap
from ...common import as_bytes
from ...shapes import KERNEL_DTYPES, Tables, check, check_groups, contiguous, two_tables


class GateWeights(NamedTuple):
    """The map from a value vector, RMS-normalised, to the gates of its KV head.

    down `[Hkv, V, rank]`, up `[Hkv, rank, 2 G]`, bias `[Hkv, 2, G]`; write_weight `[Hkv, V, 2]` and write_bias `[Hkv, 2]`, or
    None without a write gate. Logits are `normalised v @ down @ up + bias`, `normalised v @ write_weight + write_bias`.
    """

    down: Tensor
    up: Tensor
    bias: Tensor
    write_weight: Tensor | None = None
    write_bias: Tensor | None = None


class PureStep(NamedTuple):
    """What the operator without a window takes; its tensors but `out` are the kernel's first arguments.

    q, k, v and `out` have rows at any distance, each of them dense.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    recurrent: Tensor
    lengths: Tensor | None  # int64 [B], with pages: what lies in one of a text without tokens is another's
    real: Tensor | None  # uint8 [B], 0 for padding
    down: Tensor
    up: Tensor
    bias: Tensor
    write_weight: Tensor | None
    write_bias: Tensor | None
    mix_logits: Tensor
    norm_weight: Tensor
    kv_heads: Tensor | None  # int32 [Hkv]: k and v are of all heads of a layer
    state_heads: Tensor | None  # int32 [Hkv]: of more heads in states and ring
    pages: Tensor | None  # int32 [B]: where each row's states and ring are, below 0 of padding
    out: Tensor | None  # what is written to; the operator then returns an empty tensor
    gate_normalizer: float
    lower_bound: float
    scale: float
    norm_eps: float


class WindowStep(NamedTuple):
    """The same of the operator with a window. A window alone has no states, and nothing else of theirs."""

    q: Tensor
    k: Tensor
    v: Tensor
    recurrent: Tensor | None
    window_k: Tensor
    window_v: Tensor
    lengths: Tensor
    real: Tensor | None  # uint8 [B], 0 for padding
    down: Tensor | None
    up: Tensor | None
    bias: Tensor | None
    write_weight: Tensor | None
    write_bias: Tensor | None
    mix_logits: Tensor | None
    norm_weight: Tensor | None
    state_gain: Tensor | None
    state_bias: Tensor | None
    sink_logits: Tensor | None
    kv_heads: Tensor | None  # int32 [Hkv]: k and v are of all heads of a layer
    state_heads: Tensor | None  # int32 [Hkv]: of more heads in states and ring
    pages: Tensor | None  # int32 [B]: where each row's states and ring are, below 0 of padding
    out: Tensor | None  # what is written to; the operator then returns an empty tensor
    gate_normalizer: float
    lower_bound: float
    scale: float
    norm_eps: float
    softcap: float | None
    window_size: int


TENSORS = {step: step._fields.index("out") for step in (PureStep, WindowStep)}  # of each: they come first
PURE_LINES = {
    "q": f"B 1 Hq K; {KERNEL_DTYPES}",
    "k": "B 1 Hkv K; as q",
    "v": "B 1 Hkv V; as q",
    "recurrent": "B Hkv 2 K V; fp32; in place",
    "gates.down": f"Hkv V rank; {KERNEL_DTYPES}",
    "gates.bias": f"Hkv 2 G; {KERNEL_DTYPES}",
    "gates.up": f"Hkv rank gates; {KERNEL_DTYPES}",
    "gates.write_weight": f"Hkv V 2; {KERNEL_DTYPES}; optional",
    "gates.write_bias": f"Hkv 2; {KERNEL_DTYPES}; optional",
    "mix_logits": f"Hq 2; {KERNEL_DTYPES}",
    "norm_weight": f"Hq V; {KERNEL_DTYPES}",
    "padding_mask": "B tokens; optional",
    "out": "B 1 Hq V; as q; optional",
}
WINDOW_LINES = PURE_LINES | {
    "window_k": "B slots Hkv K; as q; in place",
    "window_v": "B slots Hkv V; as q; in place",
    "lengths": "B; int64; in place",
    "state_gain": f"Hq; {KERNEL_DTYPES}",
    "state_bias": f"Hq; {KERNEL_DTYPES}",
    "sink_logits": f"Hq; {KERNEL_DTYPES}; optional",
}
STATES = ("recurrent", "mix_logits", "norm_weight", "state_gain", "state_bias")
RING_LINES = {name: line for name, line in WINDOW_LINES.items() if name not in STATES and not name.startswith("gates.")}
PURE_TABLES, WINDOW_TABLES = two_tables(PURE_LINES), two_tables(WINDOW_LINES)
# Where states and ring have more heads than the layer.
HELD_LINES = {"recurrent": "B held 2 K V; fp32; in place", "state_heads": "Hkv; int32; dense"}
HELD_RING = HELD_LINES | {"window_k": "B slots held K; as q; in place", "window_v": "B slots held V; as q; in place"}
HELD_PURE_TABLES, HELD_WINDOW_TABLES = two_tables(PURE_LINES | HELD_LINES), two_tables(WINDOW_LINES | HELD_RING)
RING_TABLES = two_tables(RING_LINES)
HELD_RING_TABLES = two_tables(RING_LINES | {name: line for name, line in HELD_RING.items() if name != "recurrent"})
# Where the states and rings of rows lie in pages among others.
PAGED_LINES = {
    "pages": "B; int32; dense",
    "recurrent": "pages held 2 K V; fp32; rows",
    "lengths": "B; int64; in place",
    "state_heads": "Hkv; int32; dense; optional",
}
PAGED_RING = PAGED_LINES | {"window_k": "pages slots held K; as q; rows", "window_v": "pages slots held V; as q; rows"}
PAGED_PURE_TABLES, PAGED_WINDOW_TABLES = two_tables(PURE_LINES | PAGED_LINES), two_tables(WINDOW_LINES | PAGED_RING)
PAGED_RING_TABLES = two_tables(RING_LINES | {name: line for name, line in PAGED_RING.items() if name != "recurrent"})


def window_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    recurrent: Tensor,
    window_k: Tensor,
    window_v: Tensor,
    lengths: Tensor,
    gates: GateWeights,
    mix_logits: Tensor,
    norm_weight: Tensor,
    state_gain: Tensor,
    state_bias: Tensor,
    window_size: int,
    *,
    gate_normalizer: float = 16.0,
    lower_bound: float = -1.25,
    scale: float | None = None,
    norm_eps: float = 1e-6,
    padding_mask: Tensor | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    advance: bool = True,
    kv_heads: Tensor | None = None,
    state_heads: Tensor | None = None,
    pages: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """One token a row through the layer with a softmax window; states, ring, sinks and lengths change in place.

    Args:
        q `[B, 1, Hq, K]`, k `[B, 1, Hkv, K]`, v `[B, 1, Hkv, V]`: the token, bf16, fp32 or fp16.
        recurrent: fp32 `[B, Hkv, 2, K, V]`, the states of the blocks of W / 2 tokens before the last full one.
        window_k, window_v: `[B, S + W, Hkv, K or V]` in q's dtype: S sinks, then the ring; token j lies at slot S + j % W.
        lengths: int64 `[B]`, tokens seen before this one.
        gates: of the layer, fp32, bf16 or fp16.
        mix_logits `[Hq, 2]`, whose softmax is the mix of the states; norm_weight `[Hq, V]`, state_gain and state_bias `[Hq]`: see
            `reference.fused_window_attention`.
        padding_mask: `[B, 1]`; a padded token leaves no trace and its output is zero.
        softcap, sink_logits `[Hq]`: of the window's softmax, see `reference.dual_state_window_attention`.
        advance: also count the token in `lengths`; False leaves it to the caller, for example once for all layers.
        kv_heads: int32 `[Hkv]`: k and v are of all heads of a layer, of which these are read. Its values are not looked at.
        state_heads: int32 `[Hkv]`, where recurrent, window_k and window_v have more heads than the layer: which of theirs each KV head has;
            the others stay as they are.
        pages: int32 `[B]`, where recurrent, window_k and window_v have pages, at any distance from one another, in place of rows: in which
            of them each row's state lies. A row with a number below 0 is padding. What a page holds of another text is not read.
        out: `[B, 1, Hq, V]` in q's dtype, written to: some heads of a larger output. Within a row its heads lie side by side.

    Returns:
        o `[B, 1, Hq, V]` in q's dtype: `out` where it is given.

    Raises:
        ValueError: names the argument that does not fit, before anything is launched. Tensors that change in place must be
            contiguous.
    """
    ring = {"window_k": window_k, "window_v": window_v, "lengths": lengths}
    weights = {"mix_logits": mix_logits, "norm_weight": norm_weight, "state_gain": state_gain, "state_bias": state_bias}
    heads = {"kv_heads": kv_heads, "state_heads": state_heads, "pages": pages, "sink_logits": sink_logits}
    token = {"q": q, "k": k, "v": v, "recurrent": recurrent, "padding_mask": padding_mask, "out": out}
    tables = PAGED_WINDOW_TABLES if pages is not None else WINDOW_TABLES if state_heads is None else HELD_WINDOW_TABLES
    _check_window(_check(tables, gates, token | ring | weights | heads), window_size, softcap)
    real = _real(padding_mask)
    o = ops.window_decode(
        *dense_rows(q, k, v),
        recurrent,
        window_k,
        window_v,
        lengths,
        real,
        *contiguous(*gates, mix_logits, norm_weight, state_gain, state_bias, sink_logits),
        kv_heads,
        state_heads,
        pages,
        out,
        gate_normalizer,
        lower_bound,
        q.shape[-1] ** -0.5 if scale is None else scale,
        norm_eps,
        softcap,
        window_size,
    )
    if advance:
        lengths.add_(1 if real is None else real)
    return o if out is None else out


def ring_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_k: Tensor,
    window_v: Tensor,
    lengths: Tensor,
    window_size: int,
    *,
    scale: float | None = None,
    padding_mask: Tensor | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    advance: bool = True,
    kv_heads: Tensor | None = None,
    state_heads: Tensor | None = None,
    pages: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """One token a row through the window alone: no states. Ring, sinks and lengths change in place.

    Arguments, result and errors as `window_decode`, without the states.
    """
    ring = {"window_k": window_k, "window_v": window_v, "lengths": lengths}
    heads = {"kv_heads": kv_heads, "state_heads": state_heads, "pages": pages, "sink_logits": sink_logits}
    token = {"q": q, "k": k, "v": v, "padding_mask": padding_mask, "out": out}
    tables = PAGED_RING_TABLES if pages is not None else RING_TABLES if state_heads is None else HELD_RING_TABLES
    _check_window(_check(tables, None, token | ring | heads), window_size, softcap)
    real = _real(padding_mask)
    o = ops.window_decode(
        *dense_rows(q, k, v),
        None,
        window_k,
        window_v,
        lengths,
        real,
        *(None,) * 9,
        *contiguous(sink_logits),
        kv_heads,
        state_heads,
        pages,
        out,
        1.0,
        SMALLEST_LOG_DECAY,
        q.shape[-1] ** -0.5 if scale is None else scale,
        0.0,
        softcap,
        window_size,
    )
    if advance:
        lengths.add_(1 if real is None else real)
    return o if out is None else out


def pure_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    recurrent: Tensor,
    gates: GateWeights,
    mix_logits: Tensor,
    norm_weight: Tensor,
    *,
    gate_normalizer: float = 16.0,
    lower_bound: float = -1.25,
    scale: float | None = None,
    norm_eps: float = 1e-6,
    padding_mask: Tensor | None = None,
    kv_heads: Tensor | None = None,
    state_heads: Tensor | None = None,
    pages: Tensor | None = None,
    lengths: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """One token a row through the pure layer and its norm, `norm_weight * o / sqrt(mean(o²) + norm_eps)`; the states change in place.

    Arguments, result and errors as `window_decode`, without the window; lengths, which stay as they are, with pages alone.
    """
    token = {"q": q, "k": k, "v": v, "recurrent": recurrent, "padding_mask": padding_mask, "out": out}
    others = {"mix_logits": mix_logits, "norm_weight": norm_weight, "kv_heads": kv_heads, "state_heads": state_heads}
    if pages is None and lengths is not None:
        raise ValueError("lengths must come with pages: without, states are of the rows' own texts, or zero")
    others |= {"pages": pages, "lengths": lengths}
    tables = PAGED_PURE_TABLES if pages is not None else PURE_TABLES if state_heads is None else HELD_PURE_TABLES
    _check(tables, gates, token | others)
    o = ops.pure_decode(
        *dense_rows(q, k, v),
        recurrent,
        lengths,
        _real(padding_mask),
        *contiguous(*gates, mix_logits, norm_weight),
        kv_heads,
        state_heads,
        pages,
        out,
        gate_normalizer,
        lower_bound,
        q.shape[-1] ** -0.5 if scale is None else scale,
        norm_eps,
    )
    return o if out is None else out


def _real(padding_mask: Tensor | None) -> Tensor | None:
    """Of each row whether its token is one, as every backend can load it."""
    return None if padding_mask is None else as_bytes(padding_mask[:, -1])


def has_dense_rows(x: Tensor) -> bool:
    """Whether each row of x `[B, 1, H, D]` lies in one piece."""
    return x.stride(3) == 1 and (x.stride(2) == x.shape[3] or x.shape[2] == 1)


def dense_rows(*tensors: Tensor) -> list[Tensor]:
    """Each tensor as it is or, where its rows are not dense, as a copy."""
    return [x if has_dense_rows(x) else x.contiguous() for x in tensors]


def _check_window(sizes: dict[str, int], window_size: int, softcap: float | None) -> None:
    """Raises ValueError for a window that its slots do not fit, and for what is no cap of scores."""
    slots = sizes["slots"]
    if window_size < 2 or window_size % 2:
        raise ValueError(f"window_size must be an even number of tokens, got {window_size}")
    if not window_size <= slots <= window_size + window_size // 2:
        raise ValueError(f"window_k must have {window_size} slots and at most {window_size // 2} for sinks, got {slots}")
    check_softcap(softcap)


def _check(tables: Tables, gates: GateWeights | None, given: dict[str, Tensor | None]) -> dict[str, int]:
    """Raises ValueError that names the argument which does not fit; the sizes of those that do. Without gates: of a window alone."""
    if gates is None:
        return _check_sizes(check(tables[int(given["kv_heads"] is not None)], given), given["out"], given["state_heads"] is not None)
    given |= {
        "gates.down": gates.down,
        "gates.up": gates.up,
        "gates.bias": gates.bias,
        "gates.write_weight": gates.write_weight,
        "gates.write_bias": gates.write_bias,
    }
    q, decays = given["q"], gates.bias.shape[-1]
    if q is not None and q.ndim == 4 and decays not in (q.shape[-1], q.shape[-1] / 2):  # before gates.up, whose shape follows from it
        raise ValueError(f"gates.bias must have {q.shape[-1]} or {q.shape[-1] / 2:g} decays a state, got {decays}")
    sizes = check(tables[int(given["kv_heads"] is not None)], given, gates=2 * decays)
    _check_sizes(sizes, given["out"], given["state_heads"] is not None)
    if (gates.write_weight is None) != (gates.write_bias is None):
        raise ValueError("gates.write_weight and gates.write_bias must be given together")
    return sizes


def _check_sizes(sizes: dict[str, int], out: Tensor | None, has_state_heads: bool) -> dict[str, int]:
    """Raises ValueError for what a table cannot say; the sizes."""
    if out is not None and not has_dense_rows(out):
        raise ValueError(f"out must have the heads of a row side by side, got strides {out.stride()}: give a slice of consecutive heads")
    key_dim, value_dim = sizes["K"], sizes["V"]
    held = sizes.get("held", sizes["Hkv"])
    if not has_state_heads and held != sizes["Hkv"]:
        raise ValueError(f"pages hold {held} heads, and the layer has {sizes['Hkv']}: say which with state_heads")
    check_groups(sizes["Hq"], sizes["Hkv"])
    if max(key_dim, value_dim) > LARGEST_HEAD:
        raise ValueError(f"the kernels take heads of up to {LARGEST_HEAD} channels, got K = {key_dim}, V = {value_dim}")
    return sizes
