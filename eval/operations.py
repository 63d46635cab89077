"""Weights and operations of a distillation step, counted on paper: what must be multiplied, whatever the implementation.

Only matrix products count, two operations for each multiply-add. A backward pass goes through frozen weights for activations only,
and makes gradients of weights only for trained ones. What is computed again (checkpointing, k and v that the teacher has already)
is not counted: it need not be.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from dsla_hf import DSLAConfig

LAYER = DSLAConfig()  # the layer with states: window, sinks, rank of the gates
WINDOW_ALONE = DSLAConfig(states=False, window_size=512)


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head: int
    mlp: int
    vocabulary: int
    tied: bool = False

    def config(self) -> dict[str, Any]:
        """The same as arguments of transformers' `LlamaConfig`."""
        return {
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head,
            "intermediate_size": self.mlp,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": self.tied,
        }


SHAPES = {
    "tiny": Shape(4, 64, 4, 2, 16, 128, 512),
    "135m": Shape(30, 576, 9, 3, 64, 1536, 49152, tied=True),  # SmolLM2
    "1b": Shape(16, 2048, 32, 8, 64, 8192, 128256, tied=True),  # Llama 3.2
    "8b": Shape(32, 4096, 32, 8, 128, 14336, 128256),  # Llama 3.1
    "70b": Shape(80, 8192, 64, 8, 128, 28672, 128256),
}


# --- weights ----------------------------------------------------------------------------------------------------


def projection_weights(x: Shape) -> dict[str, int]:
    """Weights of the matrices of one block."""
    queries, keys = x.hidden * x.heads * x.head, x.hidden * x.kv_heads * x.head
    return {"q": queries, "k": keys, "v": keys, "o": queries, "mlp": 3 * x.hidden * x.mlp}


def block_weights(x: Shape) -> int:
    """Frozen weights of one block, norms included."""
    return sum(projection_weights(x).values()) + 2 * x.hidden


def trained_weights(x: Shape) -> int:
    """Trained weights of one block: its own q and o, and DualStateAttention's."""
    gates = x.kv_heads * (2 * x.head * LAYER.gate_rank + x.head + 2 * x.head + 2)
    own = x.heads * (2 + x.head + 2)
    projections = projection_weights(x)
    return projections["q"] + projections["o"] + gates + own


def frozen_weights(x: Shape) -> int:
    return x.layers * block_weights(x) + x.hidden + x.vocabulary * x.hidden * (1 if x.tied else 2)


# --- operations -------------------------------------------------------------------------------------------------


def _softmax(x: Shape, length: int) -> float:
    """Scores and values of causal attention, for one token on average."""
    return 4 * (length + 1) / 2 * x.heads * x.head


def _window(x: Shape, length: int, layer: DSLAConfig) -> float:
    """Scores and values of the window and the sinks, for one token on average."""
    seen = layer.window_size + layer.sink_tokens
    return 4 * (seen if length > seen else (length + 1) / 2) * x.heads * x.head


def _read(x: Shape) -> int:
    """A query times both states."""
    return 4 * x.heads * x.head**2


def _write(x: Shape) -> int:
    """The outer product of key and value for both states."""
    return 4 * x.kv_heads * x.head**2


def _gates(x: Shape) -> int:
    return 2 * x.kv_heads * (2 * x.head * LAYER.gate_rank + 2 * x.head)


def teacher_operations(x: Shape, tokens: int, length: int, head: bool = True) -> float:
    """A forward of the base over `tokens` in texts of `length`; `head`: with logits of all tokens."""
    block = 2 * sum(projection_weights(x).values()) + _softmax(x, length)
    return tokens * (x.layers * block + head * 2 * x.hidden * x.vocabulary)


def _of_states(x: Shape, layer: DSLAConfig) -> tuple[int, int, int]:
    """To read them, to write them, and for their gates."""
    return (_read(x), _write(x), _gates(x)) if layer.states else (0, 0, 0)


def alignment_operations(x: Shape, tokens: int, length: int, layer: DSLAConfig = LAYER) -> float:
    """Stage 1 of all layers: the teacher up to its last block, and every layer's student, forward and backward.

    k and v are the teacher's. Nothing below a student's q, gates and states gets a gradient, so a product of which one side is
    frozen has half a backward pass.
    """
    w = projection_weights(x)
    window, (read, write, gates) = _window(x, length, layer), _of_states(x, layer)
    forward = 2 * (w["q"] + w["o"]) + window + read + write + gates
    backward = 2 * (w["q"] + 2 * w["o"]) + window + 2 * read + write + 2 * gates
    return teacher_operations(x, tokens, length, head=False) + tokens * x.layers * (forward + backward)


def logits_operations(x: Shape, tokens: int, length: int, converted: Collection[int], layer: DSLAConfig = LAYER) -> float:
    """Stage 2 with these layers DSLA: teacher and student to the logits, and the way back to the lowest DSLA layer."""
    w = projection_weights(x)
    lowest, matrices = min(converted), sum(w.values())
    total = teacher_operations(x, tokens, length) / tokens + 4 * x.hidden * x.vocabulary  # the student's head, forth and back
    for i in range(x.layers):
        attention = _window(x, length, layer) + sum(_of_states(x, layer)) if i in converted else _softmax(x, length)
        total += 2 * matrices + attention
        if i < lowest:
            continue
        total += 2 * attention + (2 * (w["q"] + w["o"]) if i in converted else 0)
        total += 2 * (matrices if i > lowest else w["mlp"] + w["o"])
    return tokens * total
