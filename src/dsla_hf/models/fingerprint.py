"""Which weights an adapter was made over: a few numbers per weight, and how far those of another model are from them.

Everything in the attention of the planned layers counts, since an adapter replaces it (`q_proj`, `o_proj`) or computes with it
(`k_proj`, `v_proj`, norms, biases). What stays the base's at every level, MLPs and embeddings, does not: an adapter keeps how that was
tuned.

Of every weight W `[out, in]` eight numbers r'Wc are kept, where r and c are vectors of random signs. For two weights they differ by
the same numbers of the difference D, whose squares are |D|² on average: so the distance |D| is known, to about a quarter from one
weight and better from the same weight of many layers.
"""

from __future__ import annotations

import base64
import hashlib
import math
import struct
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..compat import align_module_device
from ..core.tensor_parallel import whole
from .architectures import fused_into, projection
from .quantised import dequantised, is_quantised

DIRECTIONS = 8
FIGURES = struct.Struct(f"<{DIRECTIONS + 1}f")  # the projections, and the size that distances are relative to

# Relative distances. Measured: rounding to bf16 0.0017, int8 0.005 to 0.018, fp8 0.026, 4 bits 0.07 to 0.2, 3 bits 0.16 to 0.35.
SAME = 1e-5
SMALL = 0.05  # of a weight over all layers; above, an adapter is refused
SMALL_ONCE = 0.1  # of one weight in one layer
EIGHT_BITS = 0.03
ANOTHER = 0.7  # other checkpoints are at 1.4
# How much farther than `_loss_of_few_bits` says a copy may be: nf4, whose steps differ, is up to 1.45 times as far as that.
LOSS_MARGIN = 1.7

# Mean magnitudes, which earlier releases recorded, of a bf16 copy of fp32 weights differ by less, those of another checkpoint by more.
MAGNITUDE_TOLERANCE = 3e-4


# --- taking one -------------------------------------------------------------------------------------------------


@torch.no_grad()
def fingerprint_of(layers: dict[int, nn.Module], rounded_to: torch.dtype | None = None) -> dict[str, Any] | None:
    """The fingerprint of attention modules by layer number, or of their weights rounded to a dtype, in JSON's types. None where weights
    are on the meta device or in a form that is not known here.

    `weights` names the parameters, `layers` holds their figures (see `FIGURES`) in this order, in base64; `dtype` is the narrowest that
    holds the values; `quantised` says whether any is held so; `loss` is the distance from what they were before they came out of 5 bits
    or fewer, 0 where they do not look so.
    """
    figures: dict[str, dict[str, list[float]]] = {}
    dtypes, quantised, loss = set(), False, 0.0
    for index, attention in layers.items():
        weights = figures[str(index)] = {}
        for name, weight, held in _weights(attention):
            if weight is None or weight.device.type == "meta":
                return None
            weight = weight if rounded_to is None else weight.to(rounded_to)
            weights[name] = _figures(f"{index}.{name}", weight)
            if weight.dim() > 1:
                dtypes.add(_narrowest_dtype(weight))
                quantised, loss = quantised or held, max(loss, _loss_of_few_bits(weight))
        matrices = {fused_into(attention, part)[0] for part in ("q_proj", "k_proj", "v_proj", "o_proj")}
        if not all(f"{name}.weight" in weights for name in matrices if getattr(attention, name) is not None):  # values may be the keys
            return None
    names = sorted({name for weights in figures.values() for name in weights})
    absent = [0.0] * (DIRECTIONS + 1)
    packed = {i: b"".join(FIGURES.pack(*weights.get(name, absent)) for name in names) for i, weights in figures.items()}
    return {
        "weights": names,
        "layers": {index: base64.b64encode(content).decode() for index, content in packed.items()},
        "dtype": str(max(dtypes, key=lambda dtype: torch.finfo(dtype).bits)).removeprefix("torch."),
        "quantised": quantised,
        "loss": round(loss, 4),
    }


def _weights(attention: nn.Module) -> Iterator[tuple[str, Tensor | None, bool]]:
    """Names and values of an attention module's parameters, whole and in floating point (None: in a form not known here), and whether
    they are held quantised."""
    for prefix, module in attention.named_modules():
        if "modules_to_save" in prefix:  # PEFT's copy for training; the base's own lies beside it
            continue
        prefix = prefix.removesuffix("original_module").removesuffix(".")
        with align_module_device(module):  # offloaded weights are brought in for as long as it takes
            for part, parameter in module.named_parameters(recurse=False):
                held = is_quantised(parameter)
                value = dequantised(module) if held else parameter
                name = f"{prefix}.{'weight' if held else part}".removeprefix(".")
                yield name, None if value is None else whole(value.detach()), held


def _signs(name: str, count: int) -> Tensor:
    """Random signs `[count, DIRECTIONS]`, the same everywhere and for ever: the bits of a hash."""
    content = torch.tensor(list(hashlib.shake_256(name.encode()).digest(count)), device="cpu")
    return 1 - 2 * ((content[:, None] >> torch.arange(DIRECTIONS, device="cpu")) & 1).double()


def _figures(name: str, weight: Tensor) -> list[float]:
    """Projections of a weight and its size. A vector's size is at least 1 per element, that of what it is added to or multiplies."""
    matrix = weight if weight.dim() == 2 else weight.reshape(1, -1)
    device = "cpu" if matrix.device.type == "mps" else matrix.device  # no fp64 there
    rows, columns = _signs(f"{name} rows", matrix.shape[0]).to(device), _signs(f"{name} columns", matrix.shape[1]).to(device)
    sums = torch.zeros(DIRECTIONS, matrix.shape[1], dtype=torch.float64, device=device)
    square = torch.zeros((), dtype=torch.float64, device=device)
    # In pieces that stay in a CPU's cache; in fp64, so that every device and order of summation gives the same.
    step = max(1, (2**18 if sums.is_cpu else 2**22) // matrix.shape[1])
    for start in range(0, matrix.shape[0], step):
        piece = matrix[start : start + step].to(device, torch.float64)
        sums += rows[start : start + step].T @ piece
        square += piece.flatten().dot(piece.flatten())
    size = math.sqrt(float(square) if weight.dim() == 2 else max(float(square), matrix.numel()))
    return [*(sums * columns.T).sum(1).tolist(), size]


def _narrowest_dtype(weight: Tensor) -> torch.dtype:
    """The narrowest dtype that holds a weight's values, as far as a few rows tell."""
    sample = weight[:16]
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        if torch.equal(sample.to(dtype).to(sample.dtype), sample):
            return dtype
    return sample.dtype


def _loss_of_few_bits(weight: Tensor) -> float:
    """How far a weight that came out of 5 bits or fewer, with a scale per group, is from what it was: its values are as far apart as the
    steps in which it was rounded. 0 if 32 neighbours in a row have more than 24 values, as almost all other weights have."""
    blocks = weight[:16, : weight.shape[1] // 32 * 32].reshape(-1, 32)[:256].double()
    gaps = blocks.sort(dim=-1).values.diff(dim=-1)
    if len(blocks) == 0 or ((gaps > 0).sum(-1) < 24).double().mean() < 0.9:
        return 0.0
    steps = gaps.where(gaps > 0, torch.nan).nanmedian(-1).values.nan_to_num()
    return float(steps.square().mean() / 12 / blocks.square().mean().clamp(min=1e-300)) ** 0.5


# --- comparing two ----------------------------------------------------------------------------------------------


@dataclass
class Distance:
    """How far weights are from others, relative to their size: `of_kind` the parameter with this name that differs most over all
    layers (root mean square), `of_one` that in one layer."""

    kind: str
    of_kind: float
    one: str
    of_one: float

    def within_rounding_to(self, *dtypes: torch.dtype) -> bool:
        """Whether rounding to these dtypes may have made it: it makes a fifth of their epsilon, which one weight's figures tell roughly."""
        epsilon = max(torch.finfo(dtype).eps for dtype in dtypes)
        return self.of_kind <= epsilon / 2 and self.of_one <= epsilon

    def __str__(self) -> str:
        return f"{self.kind} differs by {_percent(self.of_kind)} over all layers, most in {self.one} ({_percent(self.of_one)})"


def distance(recorded: dict[str, Any], found: dict[str, Any]) -> Distance:
    """The distance between the weights of two fingerprints, in the layers that both have.

    Raises:
        ValueError: if one of them is no fingerprint.
    """
    before, now = _unpacked(recorded), _unpacked(found)
    absent = (0.0,) * (DIRECTIONS + 1)
    kinds: dict[str, list[float]] = {}
    one, of_one = "", 0.0
    for index in before.keys() & now.keys():
        for name in sorted(before[index].keys() | now[index].keys()):
            old, new = before[index].get(name, absent), now[index].get(name, absent)
            square = sum((a - b) ** 2 for a, b in zip(old[:-1], new[:-1], strict=True)) / DIRECTIONS
            relative = math.sqrt(square) / (old[-1] or new[-1] or 1.0)
            relative = math.inf if math.isnan(relative) else relative
            kinds.setdefault(name, []).append(relative)
            if relative >= of_one:
                one, of_one = f"layers.{index}.{name}", relative
    over_all = {name: math.sqrt(sum(d * d for d in values) / len(values)) for name, values in kinds.items()}
    kind = max(over_all, key=lambda name: over_all[name], default="")
    return Distance(kind, over_all.get(kind, 0.0), one, of_one)


def _unpacked(fingerprint: dict[str, Any]) -> dict[str, dict[str, tuple[float, ...]]]:
    names = fingerprint["weights"]
    try:
        layers = {index: base64.b64decode(text, validate=True) for index, text in fingerprint["layers"].items()}
        return {index: dict(zip(names, FIGURES.iter_unpack(content), strict=True)) for index, content in layers.items()}
    except (ValueError, TypeError, KeyError, AttributeError, struct.error) as error:
        raise ValueError(f"base_fingerprint cannot be read ({error}): take it from the adapter's source, or remove it") from None


def _dtype(fingerprint: dict[str, Any]) -> torch.dtype:
    return getattr(torch, str(fingerprint.get("dtype")), torch.float32)


def same_base(recorded: dict[str, Any] | None, found: dict[str, Any] | None) -> bool:
    """Whether two fingerprints can be of the same weights, rounding apart. What one of them does not have is not compared; one that
    cannot be read is of other weights."""
    recorded, found = recorded or {}, found or {}
    if "weights" in recorded and "weights" in found:
        try:
            return distance(recorded, found).within_rounding_to(torch.bfloat16)
        except ValueError:
            return False
    return all(_same_magnitude(recorded[name], found[name]) for name in _magnitudes(recorded) & _magnitudes(found))


def check_base(recorded: dict[str, Any], layers: dict[int, nn.Module], base_name: str | None, own: tuple[str, ...]) -> None:
    """Compare what an adapter has recorded with attention modules by layer number. Small differences are told as warnings, and so are
    weights that look like a copy of the recorded ones in 4 bits; a base held quantised is taken for what it is.

    Args:
        base_name: where the recorded base lies, for messages.
        own: the projections of which the adapter has its own.

    Raises:
        ValueError: if these are other weights.
    """
    if "weights" not in recorded:
        return _check_magnitudes(recorded, layers, base_name)
    found = fingerprint_of(layers)
    if found is None:
        return
    off = distance(recorded, found)
    if off.of_one <= SAME or _is_rounded(recorded, found, layers, off):
        return
    loss = LOSS_MARGIN * max(recorded.get("loss", 0.0), found["loss"])
    if (recorded.get("quantised") or found["quantised"]) and off.of_kind <= max(loss, EIGHT_BITS):
        return
    made_over = base_name or "see its model card"
    if SMALL < off.of_kind <= min(loss, ANOTHER):
        this, other = "this base", f"the one that this DSLA adapter was made over ({made_over})"
        copied, original = (this, other) if found["loss"] else (other, this)
        warnings.warn(
            f"{copied} looks like a copy in a few bits of {original}, and differs by what that loses: {off}. The adapter runs over either",
            stacklevel=2,
        )
    elif off.of_kind <= SMALL and off.of_one <= SMALL_ONCE:
        warnings.warn(
            f"the base's attention differs a little from what this DSLA adapter was made over ({made_over}): {off}. A copy in 8 bits "
            f"does, and a base tuned since{_lost(own)}",
            stacklevel=2,
        )
    else:
        what = "another checkpoint" if off.of_kind >= ANOTHER else "a base that was tuned, as by a LoRA merged into it"
        raise ValueError(_refusal(f"{off}, as in {what}", base_name, own))


def _is_rounded(recorded: dict[str, Any], found: dict[str, Any], layers: dict[int, nn.Module], off: Distance) -> bool:
    """Whether one's weights are the other's in a narrower dtype."""
    before, now = _dtype(recorded), _dtype(found)
    if torch.finfo(now).bits > torch.finfo(before).bits:
        rounded = fingerprint_of(layers, rounded_to=before)
        return rounded is not None and distance(recorded, rounded).of_one <= SAME
    return before != now and off.within_rounding_to(before, now)


def _refusal(what: str, base_name: str | None, own: tuple[str, ...] = ()) -> str:
    return (
        f"this DSLA adapter was made for other weights of the same shape: {what}. Load the base it was made over "
        f"({base_name or 'see its model card'}), or distil an adapter over this one; if the base was changed on purpose, remove "
        f"base_fingerprint from adapter_config.json{_lost(own)}"
    )


def _lost(own: tuple[str, ...]) -> str:
    return f": converted layers lose what was tuned in {', '.join(own)}, of which the adapter has its own" if own else ""


def _percent(share: float) -> str:
    return f"{100 * share:.2g}%" if share < 1 else f"{100 * share:.0f}%"


# --- fingerprints of earlier releases ---------------------------------------------------------------------------


def _magnitudes(fingerprint: dict[str, Any]) -> set[str]:
    return {name for name, value in fingerprint.items() if isinstance(value, float)}


def _same_magnitude(recorded: float, found: float) -> bool:
    return abs(recorded - found) <= MAGNITUDE_TOLERANCE * abs(recorded)


def _check_magnitudes(recorded: dict[str, Any], layers: dict[int, nn.Module], base_name: str | None) -> None:
    """Mean magnitudes of keys and values, all that earlier releases recorded."""
    for index, attention in layers.items():
        for part in ("k_proj", "v_proj"):
            name = f"layers.{index}.{part}"
            linear, rows = projection(attention, part)
            weight = getattr(linear, "weight", None)
            if name not in recorded or weight is None or is_quantised(weight) or weight.device.type == "meta":
                continue
            magnitude = float(whole(weight.detach())[rows].float().abs().mean())
            if not _same_magnitude(recorded[name], magnitude):
                raise ValueError(_refusal(f"mean |{name}| was {recorded[name]:.6g} and is {magnitude:.6g} here", base_name))
