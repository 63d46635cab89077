"""A token's keys and values into a cache, in one launch: both tensors, all rows, and the count of tokens beside them."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._ops import add_op_namespace_prefix, ops
from ...common import COUNTS, on_its_device, unit_stride
from ...shapes import check, table
from .tiles import held_as

TABLE = table(
    {
        "k": "B Hkv 1 K; dense",
        "v": "B Hkv 1 V; dense",
        "keys": "rows Hkv L K; as k or fp8; dense",
        "values": "rows Hkv L V; as v or fp8; dense",
        "places": "B; int32 or int64",
        "count": "; int64; optional",
    }
)
TABLE_OF_HEADS = table(
    {
        "k": "B Hkv 1 K; dense",
        "v": "B Hkv 1 V; dense",
        "keys": "1 columns L K; as k or fp8; dense",
        "values": "1 columns L V; as v or fp8; dense",
        "heads": "Hkv 2; int32; (of each KV head its table and its column)",
        "places": "tables B; int32 or int64",
        "count": "; int64; optional",
    }
)


@triton.jit(do_not_specialize=COUNTS)
def _append_kernel(
    keys,  # [B, Hkv, places, K], any strides but a dense last dimension
    values,
    k,  # [B, Hkv, 1, K], likewise
    v,
    places,  # [B]; with heads [tables, B]
    heads,  # [Hkv, 2] or None
    count,  # [] or None
    keys_b,
    keys_h,
    keys_t,
    values_b,
    values_h,
    values_t,
    k_b,
    k_h,
    v_b,
    v_h,
    places_next,
    HKV,
    K: tl.constexpr,
    V: tl.constexpr,
    BD: tl.constexpr,
):
    row, head = tl.program_id(0) // HKV, tl.program_id(0) % HKV
    row = row.to(tl.int64)
    held = head
    if heads is not None:
        places += tl.load(heads + head * 2).to(tl.int64) * places_next
        held = tl.load(heads + head * 2 + 1)
    held = held.to(tl.int64)
    place = tl.load(places + row).to(tl.int64)
    channel = tl.arange(0, BD)
    key = held_as(tl.load(k + row * k_b + head * k_h + channel, mask=channel < K), keys.dtype.element_ty)
    tl.store(keys + row * keys_b + held * keys_h + place * keys_t + channel, key, mask=channel < K)
    value = held_as(tl.load(v + row * v_b + head * v_h + channel, mask=channel < V), values.dtype.element_ty)
    tl.store(values + row * values_b + held * values_h + place * values_t + channel, value, mask=channel < V)
    if count is not None:  # noqa: SIM102 (known at compile time, the other is not)
        if tl.program_id(0) == 0:
            tl.store(count, tl.load(count) + 1)


@torch.library.custom_op(add_op_namespace_prefix("append"), mutates_args=("keys", "values", "count"))
@on_its_device
def _append(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, places: Tensor, count: Tensor | None, heads: Tensor | None) -> None:
    batch, kv_heads, _, key_dim = k.shape
    # Rows of a pool lie in one tensor.
    rows = [x.stride(0) if x.shape[0] == batch else 0 for x in (keys, values)]
    _append_kernel[(batch * kv_heads,)](
        keys,
        values,
        k,
        v,
        places,
        heads,
        count,
        rows[0],
        *keys.stride()[1:3],
        rows[1],
        *values.stride()[1:3],
        *k.stride()[:2],
        *v.stride()[:2],
        0 if heads is None else places.stride(0),
        **_options(kv_heads, key_dim, v.shape[-1]),
    )


@functools.cache
def _options(kv_heads: int, key_dim: int, value_dim: int) -> dict[str, int]:
    largest = max(key_dim, value_dim)
    warps = 1 if largest <= 128 else 2
    return {"HKV": kv_heads, "K": key_dim, "V": value_dim, "BD": triton.next_power_of_2(largest), "num_warps": warps}


@_append.register_fake
def _(keys, values, k, v, places, count, heads):
    return None


def append(
    keys: Tensor,
    values: Tensor,
    k: Tensor,
    v: Tensor,
    places: Tensor,
    count: Tensor | None = None,
    heads: Tensor | None = None,
) -> None:
    """Write the keys and values of one token a row, in place.

    Args:
        keys `[B or 1, Hkv, L, K]`, values `[B or 1, Hkv, L, V]`: the cache; with one row, that of all rows (a pool of places).
        k `[B, Hkv, 1, K]`, v `[B, Hkv, 1, V]`: of the cache's dtype, or any where that is fp8 (`narrow.stored`). The last dimension of all
            four is dense.
        places: int `[B]`, below L: where in the cache each row's token goes. Rows that share a place leave either's there.
        count: int64 `[]` that becomes one more, if given.
        heads: int32 `[Hkv, 2]`, for a pool `[1, columns, L, D]` that heads of several layers share, with places `[tables, B]`: KV head h
            goes into column `heads[h, 1]`, to the places of table `heads[h, 0]`.

    Raises:
        ValueError: names what does not fit, before anything is written.
    """
    given = {"k": k, "v": v, "keys": keys, "values": values, "places": places, "count": count}
    if heads is not None:
        check(TABLE_OF_HEADS, given | {"heads": heads})
        ops.append(keys, values, k, v, unit_stride(places), count, heads.contiguous())
        return
    sizes = check(TABLE, given)
    if sizes["rows"] not in (1, sizes["B"]):
        raise ValueError(f"keys and values must have 1 row or {sizes['B']}, as k and v have, got {list(keys.shape)}")
    ops.append(keys, values, k, v, places.contiguous(), count, None)
