"""What the queries of a KV head read of its states: both are loaded a part of their channels at a time.

Query heads and values come as tuples, with the mask of those that exist.
"""

import triton
import triton.language as tl

from ...common import load_rows


@triton.jit
def load_queries(q, part, group, K: tl.constexpr, R: tl.constexpr, FEW: tl.constexpr):
    """Channels `part` of the group's queries: vectors if they are few, else a tile."""
    if FEW:
        queries = ()
        for r in tl.static_range(R):
            queries = queries + (tl.load(q + r * K + part, mask=part < K, other=0.0),)  # type: ignore[assignment]
        return queries
    else:
        return load_rows(q, group[0], group[1], K, part, part < K)


@triton.jit
def load_states(recurrent, part, values, K: tl.constexpr, V: tl.constexpr):
    """Channels `part` of both states, `[part, V]`. Nobody reads them again before the next token: others keep the L2 cache."""
    pointers = recurrent + part[:, None] * V + values[0][None, :]
    mask = (part < K)[:, None] & values[1][None, :]
    state1 = tl.load(pointers, mask=mask, other=0.0, eviction_policy="evict_first")
    return state1, tl.load(pointers + K * V, mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def load_mix(mix_logits, group, R: tl.constexpr, FEW: tl.constexpr):
    """Weights of both states, a softmax of two: scalars for every query head if they are few, else columns."""
    if FEW:
        mix1, mix2 = (), ()
        for r in tl.static_range(R):
            lead = tl.load(mix_logits + r * 2).to(tl.float32) - tl.load(mix_logits + r * 2 + 1).to(tl.float32)
            mix1 = mix1 + (tl.sigmoid(lead),)  # type: ignore[assignment]
            mix2 = mix2 + (tl.sigmoid(-lead),)  # type: ignore[assignment]
        return mix1, mix2
    else:
        lead = tl.load(mix_logits + group[0] * 2, mask=group[1], other=0.0).to(tl.float32)
        lead -= tl.load(mix_logits + group[0] * 2 + 1, mask=group[1], other=0.0).to(tl.float32)
        return tl.sigmoid(lead)[:, None], tl.sigmoid(-lead)[:, None]


@triton.jit
def no_sums(R: tl.constexpr, BM: tl.constexpr, BV: tl.constexpr, ROWS: tl.constexpr, FEW: tl.constexpr):
    if FEW:
        sums = ()
        for _ in tl.static_range(R):
            sums = sums + (tl.zeros([ROWS, BV], tl.float32),)  # type: ignore[assignment]
    else:
        sums = tl.zeros([BM, BV], tl.float32)
    return sums


@triton.jit
def add_products(
    sums,
    queries,
    mixes,
    state1,
    state2,
    scale,
    R: tl.constexpr,
    ROWS: tl.constexpr,
    FEW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds what the queries read of a part of both states.

    A product of tiles would be padded to 16 rows and do up to 16 times the work, so few queries are multiplied one by one. Their
    sums over channels stay apart in ROWS rows, as many as the program's threads hold at a time: each adds its own registers.
    """
    mix1, mix2 = mixes
    if FEW:
        more = ()
        for r in tl.static_range(R):
            query = queries[r].to(tl.float32) * scale
            product = (query * mix1[r].to(tl.float32))[:, None] * state1 + (query * mix2[r].to(tl.float32))[:, None] * state2
            rows = tl.sum(tl.reshape(product, [product.shape[0] // ROWS, ROWS, product.shape[1]]), 0)
            more = more + (sums[r] + rows,)  # type: ignore[assignment]
        return more
    else:
        query = queries.to(tl.float32) * scale
        sums = tl.dot(query * mix1.to(tl.float32), state1, acc=sums, input_precision=PRECISION)
        return tl.dot(query * mix2.to(tl.float32), state2, acc=sums, input_precision=PRECISION)


@triton.jit
def finished(sums, group, R: tl.constexpr, BM: tl.constexpr, BV: tl.constexpr, FEW: tl.constexpr):
    """The sums as a tile `[BM, BV]`."""
    if FEW:
        o = tl.zeros([BM, BV], tl.float32)
        for r in tl.static_range(R):
            o = tl.where(group[0][:, None] == r, tl.sum(sums[r], 0)[None, :], o)
        return o
    else:
        return sums


@triton.jit
def read_states(
    recurrent,
    q,
    mixes,
    queries,
    states,
    first_channel,
    group,
    values,
    scale,
    R: tl.constexpr,
    BM: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BV: tl.constexpr,
    CHANNELS: tl.constexpr,
    KC: tl.constexpr,
    ROWS: tl.constexpr,
    FEW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What the queries read of CHANNELS channels; queries and states of the first KC are loaded."""
    sums = no_sums(R, BM, BV, ROWS, FEW)
    for start in tl.static_range(0, CHANNELS, KC):
        part = first_channel + start + tl.arange(0, KC)
        state1, state2 = states
        if start + KC < CHANNELS:
            states = load_states(recurrent, part + KC, values, K, V)
        if start > 0:
            queries = load_queries(q, part, group, K, R, FEW)
        sums = add_products(sums, queries, mixes, state1, state2, scale, R, ROWS, FEW, PRECISION)
    return sums
