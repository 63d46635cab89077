"""Which implementation runs: chosen from the inputs, told on request, never changed silently.

On NVIDIA GPUs the Triton kernels run, elsewhere chunked PyTorch. The environment variable DSLA_KERNELS overrules: `pytorch`, or
`triton` (which then raises where it cannot run, instead of falling back; on a CPU it needs TRITON_INTERPRET=1).
"""

import importlib.util
import os
import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import narrow, reference
from .checks import LARGEST_HEAD, LARGEST_RANK, MOST_ROWS

VARIABLE = "DSLA_KERNELS"
CHOICES = ("auto", "pytorch", "triton")
HAS_TRITON = importlib.util.find_spec("triton") is not None
choice = os.environ.get(VARIABLE, "auto")  # read once, so that compiled code can rely on it
if choice not in CHOICES:
    raise ValueError(f"{VARIABLE} must be one of {', '.join(CHOICES)}, got {choice!r}")


def _obstacle(device_type: str) -> str | None:
    """Why the Triton kernels cannot run on an accelerator, in words, or None."""
    if not HAS_TRITON:
        return "Triton is not installed; `pip install triton` makes this layer several times faster"
    if device_type != "cuda" or torch.version.cuda is None:
        return "the Triton kernels are written for NVIDIA GPUs"
    return None


def uses_triton(q: Tensor, v: Tensor, quietly: bool = False) -> bool:
    """Whether the Triton kernels take these heads `[..., D]`. That slow code runs on an accelerator is said once, unless `quietly`."""
    if choice != "auto" or q.device.type == "cpu":
        return choice == "triton"
    obstacle, largest = _obstacle(q.device.type), max(q.shape[-1], v.shape[-1])
    if obstacle is None and largest > LARGEST_HEAD:
        obstacle = f"the Triton kernels take heads of up to {LARGEST_HEAD} channels, these have {largest}"
    if obstacle is not None:
        if quietly:
            return False
        warnings.warn(f"chunked PyTorch runs on {q.device.type}: {obstacle}", stacklevel=4)  # shown once a place
        return False
    return q.dtype in (torch.bfloat16, torch.float16, torch.float32)


def divergence(student: Tensor, teacher: Tensor, weights: Tensor, reuse_teacher: bool = False) -> Tensor:
    """Sum over rows of weight * KL(teacher || student), see `ops.loss.divergence`; for logits that `takes_logits` says are taken."""
    from .ops import loss

    return loss.divergence(student, teacher, weights, reuse_teacher)


def takes_logits(student: Tensor, teacher: Tensor) -> bool:
    """Whether `divergence` takes these logits: of any number, where Triton runs."""
    if choice != "auto" or student.device.type == "cpu":
        runs = choice == "triton"
    else:
        runs = _obstacle(student.device.type) is None
    return runs and all(x.dtype in (torch.bfloat16, torch.float16, torch.float32) for x in (student, teacher))


def draw(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, log_min_p: Tensor, keys: Tensor, filtered: bool) -> Tensor:
    """A token for each row of logits, see `ops.sample.draw`; for logits that `draws_logits` says are taken."""
    from .ops import sample

    return sample.draw(logits, temperature, top_k, top_p, log_min_p, keys, filtered)


def draws_logits(logits: Tensor) -> bool:
    """Whether `draw` takes these logits `[R, V]`."""
    return takes_logits(logits, logits) and logits.stride(1) == 1


def kernel_path(device: torch.device | str) -> str:
    """The implementation that runs on `device`, for people to read, e.g. by `dsla env`."""
    kind = torch.device(device).type
    if choice != "auto":
        return f"{'chunked PyTorch' if choice == 'pytorch' else 'Triton'} ({VARIABLE}={choice})"
    if kind == "cpu":
        return "chunked PyTorch"
    obstacle = _obstacle(kind)
    return f"chunked PyTorch: {obstacle}" if obstacle else "Triton"


def gate_logits(
    v: Tensor,
    gate_down: Tensor,
    gate_up: Tensor,
    gate_bias: Tensor,
    write_weight: Tensor | None = None,
    write_bias: Tensor | None = None,
    *,
    norm_eps: float,
    kv_heads: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Raw gates and raw write gates from values, see `reference.gate_logits`, which runs for fp64 and for ranks above 64 everywhere."""
    weights = (gate_down, gate_up, gate_bias, write_weight, write_bias)
    if v.dtype != torch.float64 and gate_down.shape[-1] <= LARGEST_RANK and uses_triton(v, v, quietly=True):  # attention says it
        from .ops.states import gates

        return gates.gate_logits(v, *weights, norm_eps=norm_eps, kv_heads=kv_heads)
    return reference.gate_logits(v, *weights, norm_eps=norm_eps, kv_heads=kv_heads)


def dual_state_attention(q: Tensor, k: Tensor, v: Tensor, gate_logits: Tensor, mix: Tensor, **options) -> tuple[Tensor, Tensor | None]:
    """The layer without a window, see `reference.dual_state_attention`."""
    if uses_triton(q, v):
        from .ops import chunk

        return chunk.dual_state_attention(q, k, v, gate_logits, mix, **options)
    return reference.dual_state_attention(q, k, v, gate_logits, mix, **options)


def fused_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate_logits: Tensor,
    mix: Tensor,
    norm_weight: Tensor,
    state_gain: Tensor,
    state_bias: Tensor,
    window_size: int,
    **options,
) -> tuple[Tensor, Tensor | None]:
    """The layer with a softmax window, see `reference.fused_window_attention`."""
    arguments = (q, k, v, gate_logits, mix, norm_weight, state_gain, state_bias, window_size)
    if uses_triton(q, v):
        from .ops import window

        return window.fused_window_attention(*arguments, **options)
    return reference.fused_window_attention(*arguments, **options)


def window_attention(q: Tensor, k: Tensor, v: Tensor, window_size: int, **options) -> Tensor:
    """The softmax window without states, see `reference.window_attention`."""
    if uses_triton(q, v):
        from .ops import window

        return window.window_attention(q, k, v, window_size, **options)
    return reference.window_attention(q, k, v, window_size, **options)


def final_state(k: Tensor, v: Tensor, gate_logits: Tensor, **options) -> Tensor:
    """The states after rows of keys and values, `[B, Hkv, 2, K, V]`: the last entry of `reference.block_states`, which itself runs where a
    gradient is asked for: the kernel has none."""
    tensors = (k, v, gate_logits, options.get("write_logits"), options.get("initial_state"))
    needs_gradient = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    if uses_triton(k, v) and not needs_gradient:
        from .ops import states

        return states.final_state(k, v, gate_logits, **options)
    return reference.block_states(k, v, gate_logits, 64, **options)[:, -1].clone()  # not a view of all boundaries


def softmax_decode(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, **options) -> Tensor:
    """Softmax attention of a token a row, or of a few, over its cache, see `reference.softmax_decode`. On a GPU it has no gradient."""
    if uses_triton(q, values):
        from .ops import softmax

        return softmax.softmax_decode(q, keys, values, lengths, **options)
    return reference.softmax_decode(q, keys, values, lengths, **options)


def softmax_prompt(q: Tensor, keys: Tensor, values: Tensor, starts: Tensor, lengths: Tensor, block_table: Tensor, **options) -> Tensor:
    """Softmax attention of a piece of a text a row over blocks, see `reference.softmax_prompt`. On a GPU it has no gradient."""
    if uses_triton(q, values):
        from .ops import softmax

        return softmax.softmax_prompt(q, keys, values, starts, lengths, block_table, **options)
    return reference.softmax_prompt(q, keys, values, starts, lengths, block_table, **options)


def takes_few_rows(x: Tensor, *weights: Tensor) -> bool:
    """Whether the Triton kernels for linear layers of few rows take x `[..., K]` and weights `[N, K]`: 16 rows at most, one dtype and
    device, weights whose rows are dense and as far from each other in all, gradients off and no autocast."""
    if choice == "pytorch" or (choice == "auto" and _obstacle(x.device.type) is not None):
        return False
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32) or torch.is_autocast_enabled(x.device.type):
        return False
    if torch.is_grad_enabled():
        return False
    return 0 < x.numel() <= MOST_ROWS * x.shape[-1] and all(
        weight.dtype == x.dtype
        and weight.device == x.device
        and weight.shape[1] == x.shape[-1]
        and weight.stride() == (weights[0].stride(0), 1)
        for weight in weights
    )


def linears(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] | None = None, **options) -> list[Tensor]:
    """Up to three linear layers of one x, each as `F.linear`; in one launch where x has few rows and gradients are off."""
    if takes_few_rows(x, *weights):
        from .ops import linear

        return linear.linears(x, weights, biases, **options)
    every: Sequence[Tensor | None] = biases or [None] * len(weights)
    return [F.linear(x, weight, bias) for weight, bias in zip(weights, every, strict=True)]


def gated_linear(x: Tensor, gate_weight: Tensor, up_weight: Tensor, activation: str = "silu", **options) -> Tensor:
    """The first half of a gated MLP, see `reference.gated_linear`; in one launch where `linears` is one."""
    if takes_few_rows(x, gate_weight, up_weight):
        from .ops import linear

        return linear.gated_linear(x, gate_weight, up_weight, activation, **options)
    return reference.gated_linear(x, gate_weight, up_weight, activation)


def append(
    keys: Tensor, values: Tensor, k: Tensor, v: Tensor, places: Tensor, count: Tensor | None = None, heads: Tensor | None = None
) -> None:
    """A token of each row into a cache, in place, see `ops.softmax.append`; without Triton as PyTorch indexes."""
    if uses_triton(k, v):
        from .ops import softmax

        return softmax.append(keys, values, k, v, places, count, heads)
    k, v = (narrow.bits(narrow.stored(x, cache.dtype)) for x, cache in ((k, keys), (v, values)))
    keys, values = narrow.bits(keys), narrow.bits(values)
    if heads is not None:
        table, column = heads.long().unbind(1)
        here = column[:, None], places.long()[table]
        keys[0][here], values[0][here] = (x[:, :, 0].transpose(0, 1) for x in (k, v))
    else:
        rows = torch.arange(k.shape[0], device=k.device) % keys.shape[0]  # one row is that of all
        keys[rows, :, places.long()], values[rows, :, places.long()] = k[:, :, 0], v[:, :, 0]
    if count is not None:
        count.add_(1)
