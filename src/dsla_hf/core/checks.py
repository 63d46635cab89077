"""What sizes, rotary layouts and half-lives a DSLA layer can have."""

from __future__ import annotations

import math

# Which of the R channels that a base rotates are a pair: (i, i + R/2), or (2i, 2i + 1).
ROTARY_LAYOUTS = ("halves", "interleaved")


def check_window(window_size: int, sink_tokens: int, states: bool = True) -> None:
    """Raises ValueError unless the window is an even number of tokens and the sinks fit into one block of it, or where there is nothing:
    neither window nor states."""
    if not isinstance(states, bool):
        raise ValueError(f"states must be True or False, got {states!r}")
    if not states and not window_size:
        raise ValueError("states=False leaves a window alone, and window_size=0 none: give window_size, or leave states at True")
    if window_size < 0 or window_size % 2:
        raise ValueError(f"window_size must be an even number of tokens, or 0 for no window, got {window_size}")
    if sink_tokens < 0 or (window_size and sink_tokens > window_size // 2):
        raise ValueError(f"sink_tokens must be from 0 to half the window of {window_size}, got {sink_tokens}")


def check_rotary(layout: str, dim: int) -> None:
    """Raises ValueError unless the layout is known and the channels that rotate are pairs."""
    if layout not in ROTARY_LAYOUTS:
        raise ValueError(f"rotary_layout must be one of {list(ROTARY_LAYOUTS)}, got {layout!r}")
    if not isinstance(dim, int) or isinstance(dim, bool) or dim < 0 or dim % 2:
        raise ValueError(f"rotary_dim must be an even number of channels, got {dim!r}")


def half_life_range(half_life: float | tuple[float, float]) -> tuple[float, float]:
    """A half-life, or the pair (of the fastest channel, of the slowest), as a pair.

    Raises:
        ValueError: if it is no such pair, or an entry is not a positive number of tokens.
    """
    pair = half_life if isinstance(half_life, (tuple, list)) else (half_life, half_life)
    if len(pair) != 2:
        raise ValueError(f"a range of half-lives is a pair (fastest, slowest), got {half_life}")
    for life in pair:
        half_life_to_logit(life)
    return pair[0], pair[1]


def half_life_to_logit(half_life: float, gate_normalizer: float = 16.0) -> float:
    """The gate logit b with logsigmoid(b) / gate_normalizer = -ln 2 / half_life.

    Raises:
        ValueError: if the half-life is not a positive number of tokens.
    """
    if not 0 < half_life < math.inf:
        raise ValueError(f"a half-life is a positive number of tokens, got {half_life}")
    log_sigmoid = -math.log(2) * gate_normalizer / half_life
    return log_sigmoid - math.log(-math.expm1(log_sigmoid))
