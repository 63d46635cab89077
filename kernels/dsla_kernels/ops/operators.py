"""Operators of torch that take the fields of a NamedTuple, each as an argument of its own: schemas, and gradients by a second operator."""

from collections.abc import Callable, Sequence
from typing import Any, get_type_hints

import torch
from torch import Tensor

KINDS = {Tensor: "Tensor", Tensor | None: "Tensor?", int: "SymInt", float: "float", float | None: "float?", bool: "bool"}


def schema(fields: type, results: str, before: str = "", changed: Sequence[str] = ()) -> str:
    """Of an operator with the arguments `before`, which end in a comma, and the fields of a NamedTuple: `(Tensor q, ...) -> results`.
    Tensors `changed` are written to."""
    kinds = {name: KINDS[kind] for name, kind in get_type_hints(fields).items()}
    kinds |= {name: kinds[name].replace("Tensor", f"Tensor({letter}!)") for letter, name in zip("abcdefgh", changed, strict=False)}
    return f"({before}{', '.join(f'{kind} {name}' for name, kind in kinds.items())}) -> {results}"


def like(inputs: Sequence[Tensor | None], some: Tensor) -> list[Tensor]:
    """Uninitialised gradients of inputs; empty, on the device of `some`, for what is None."""
    return [some.new_empty(0) if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in inputs]


def as_results(gradients: Sequence[Tensor | None], inputs: Sequence[Tensor | None], some: Tensor) -> list[Tensor]:
    """Gradients as `like` has them, in the dtype of their inputs."""
    pairs = zip(gradients, inputs, strict=True)
    return [some.new_empty(0) if d is None or x is None else d.to(x.dtype).contiguous() for d, x in pairs]


def register_gradients(forward: Any, backward: Callable[..., list[Tensor]], fields: Any, kept: int = 0) -> None:
    """Makes the operator `forward(*fields)` differentiable in its first arguments.

    Its results are o, what else there is, and the final state, with a gradient where `fields.output_final_state`.
    `backward(do, d_final, *results[:kept], *fields)` gives the gradients of as many arguments as have one, as `like` has them.
    """
    tensors = sum(kind in (Tensor, Tensor | None) for kind in get_type_hints(fields).values())  # these come first

    def save(ctx, inputs, output):
        ctx.save_for_backward(*output[:kept], *inputs[:tensors])
        ctx.options = inputs[tensors:]

    def run(ctx, do, *others):
        saved = ctx.saved_tensors
        inputs = fields(*saved[kept:], *ctx.options)
        d_final = others[-1].contiguous() if inputs.output_final_state else None
        found = backward(do.contiguous(), d_final, *saved[:kept], *inputs)
        gradients = [None if x is None else d for x, d in zip(inputs, found, strict=False)]
        return *gradients, *[None] * (len(inputs) - len(gradients))

    forward.register_autograd(run, setup_context=save)
