"""The picture of a plan: layers × KV heads, which of them a level keeps, and when the others go over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...core.plots import figure, mark_measured
from ...levels.table import kept_text
from ...models.configuration import DSLAConfig

CELL, WIDEST, HIGHEST = 0.36, 11.0, 7.0  # inches
Colour = tuple[float, float, float, float]
MOST_NUMBERS = 128  # of cells that have their place written in them
# Converted and kept heads: matplotlib's name of a map of colours, and the part of it from the first of them in the order to the last.
CONVERTED, KEPT = ("Blues", 0.1, 0.55), ("Oranges", 0.35, 0.65)
LEFT_OUT = 0.9  # likewise, of kept heads that are not in the order
OTHER = (0.88, 0.88, 0.88, 1.0)  # layers without heads that could be converted


def places(config: DSLAConfig) -> dict[tuple[int, int], int]:
    """The place in the order, from 1 on, of every (layer, KV head) of the plan; of a plan of layers all heads of a layer have one."""
    order = config.conversion_order or []
    if config.conversion_unit == "head":
        return {(layer, head): place for place, (layer, head) in enumerate(order, 1)}
    return {(layer, head): place for place, layer in enumerate(order, 1) for head in range(config.kv_heads)}


def draw_heads(config: DSLAConfig) -> Any:
    """A figure of the KV heads of all layers at the config's level: a column for each layer, a cell for each head. Kept ones are orange,
    converted ones blue; the later in the order, the darker. Heads that the plan leaves to the base are the darkest kept ones. Grey are
    layers without heads that could be converted, such as linear ones.

    Args:
        config: of a model, or as an adapter's folder has it.

    Raises:
        ValueError: if it is of no model yet, and so does not know how many heads there are.
        ImportError: without matplotlib.
    """
    heads = config.kv_heads
    sizes, found = config.base_dimensions or {}, places(config)
    layers = sizes["num_hidden_layers"]
    convertible = sizes.get("convertible_layers", range(layers))
    last = max(found.values(), default=0)
    level = last if config.level is None else config.level
    cell = min(CELL, WIDEST / layers, HIGHEST / heads)
    width = max(4.5, 1.2 + cell * layers)
    drawn, (axes,) = figure(size=(width, 1.5 + heads * min((width - 0.7) / layers, HIGHEST / heads)))
    colours = _colours(level, last)
    grid = [[colours(found.get((layer, head))) if layer in convertible else OTHER for layer in range(layers)] for head in range(heads)]
    axes.imshow(grid, aspect="equal", interpolation="nearest")
    _lines(axes, layers, heads)
    if layers * heads <= MOST_NUMBERS:
        for (layer, head), place in found.items():
            axes.text(layer, head, str(place), ha="center", va="center", fontsize=7 if last < 100 else 6)
    axes.set(xlabel="layer", ylabel="KV head")
    mark_measured(axes.xaxis, range(layers))
    mark_measured(axes.yaxis, range(heads))
    units = len(convertible) * heads
    kept = units - sum(place <= level for place in found.values())
    _legend(drawn, colours, level, kept_text(kept, units, of=True), len(found) < units, len(convertible) < layers)
    return drawn


def _colours(level: int, last: int) -> Callable[[int | None], Colour]:
    """A function from a place in an order of `last` (None: not in it) to a colour."""
    from matplotlib import colormaps

    def colour(place: int | None) -> Colour:
        if place is None:
            return colormaps[KEPT[0]](LEFT_OUT)
        first, end = (1, level) if place <= level else (level + 1, last)
        name, low, high = CONVERTED if place <= level else KEPT
        return colormaps[name](low + (high - low) * (place - first) / max(end - first, 1))

    return colour


def _lines(axes: Any, layers: int, heads: int) -> None:
    """White lines between the cells."""
    axes.hlines([head - 0.5 for head in range(1, heads)], -0.5, layers - 0.5, color="white", linewidth=1)
    axes.vlines([layer - 0.5 for layer in range(1, layers)], -0.5, heads - 0.5, color="white", linewidth=1)
    axes.tick_params(length=0, labelsize=8)
    for side in axes.spines.values():
        side.set_visible(False)


def _legend(drawn: Any, colours: Callable[[int | None], Colour], level: int, kept: str, left_out: bool, others: bool) -> None:
    from matplotlib.patches import Patch

    patches = [Patch(color=colours(level + 1), label=f"level {level} keeps {kept}")]
    if level:
        patches.append(Patch(color=colours(level), label="converted; the darker, the later"))
    if left_out:
        patches.append(Patch(color=colours(None), label="kept at every level: not in the order"))
    if others:
        patches.append(Patch(color=OTHER, label="layers without attention that could be converted"))
    drawn.legend(handles=patches, loc="outside upper left", fontsize=8, frameon=False)
