"""What a distillation takes on GPUs that were not there to measure: bytes and operations on paper, speed from measured rows.

Weights are cut over all GPUs (FSDP2) and gathered block by block, activations are checkpointed. Every figure of time follows from
the share of the floor that the 8B shape reached in a row of eval/results/scale.json on one process; without such a row it is left out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from operations import (
    SHAPES,
    Shape,
    alignment_operations,
    block_weights,
    frozen_weights,
    logits_operations,
    trained_weights,
)
from reporting import fill_page, rows_table

from dsla_hf.core.plots import figure, save

PAGE = Path(__file__).parent.parent / "docs" / "scale.md"
BF16, FP32, ADAM = 2, 4, 8  # bytes of a weight, and of Adam's two moments of it
STAGES = ("alignment", "logits")
MEASURED_AS = "8b"
MISSING = "needs a row of scale.json"


def gathered_bytes(x: Shape) -> int:
    """What FSDP gathers of all blocks: frozen weights in bf16, trained ones in fp32."""
    return x.layers * (BF16 * block_weights(x) + FP32 * trained_weights(x))


def memory_per_gpu(x: Shape, gpus: int, tokens: int) -> dict[str, float]:
    """Bytes per GPU by what they hold, for `tokens` per GPU and step, in the stage that takes more: alignment keeps the targets of its
    students, the other the logits of teacher and student."""
    block = gathered_bytes(x) / x.layers
    ends = BF16 * x.vocabulary * x.hidden * (1 if x.tied else 2)
    inputs = BF16 * x.layers * tokens * x.hidden
    return {
        "frozen weights, cut": BF16 * frozen_weights(x) / gpus,
        "trained weights, gradients and Adam, cut": (2 * FP32 + ADAM) * x.layers * trained_weights(x) / gpus,
        "two blocks and their gradients, whole": 2 * (block + FP32 * trained_weights(x)),
        "embeddings and head, whole": ends,
        "inputs of the blocks, and targets or logits": max(2 * inputs, inputs + 2 * BF16 * tokens * x.vocabulary),
    }


def traffic_per_step(x: Shape, gpus: int) -> dict[str, float]:
    """Bytes that a GPU receives in a step of each stage: the blocks gathered for every pass (alignment has a forward and a backward
    pass, logits two forwards and a backward pass), and the gradients of trained weights summed and cut."""
    others = (gpus - 1) / gpus
    gather, gradients = gathered_bytes(x), FP32 * x.layers * trained_weights(x)
    ends = BF16 * x.vocabulary * x.hidden * (1 if x.tied else 2)
    return {"alignment": others * (2 * gather + ends + gradients), "logits": others * (3 * gather + 3 * ends + gradients)}


def measured_share(rows: list[dict[str, Any]], stage: str) -> dict[str, Any] | None:
    """The best row of the measured shape for a stage, on one process."""
    found = [row for row in rows if (row["shape"], row["stage"], row["processes"]) == (MEASURED_AS, stage, 1) and row.get("states", True)]
    return max(found, key=lambda row: row["share_of_floor"], default=None)


def plan(rows: list[dict[str, Any]], bandwidth: float, name: str = "70b", gpus: int = 64, length: int = 4096) -> list[dict[str, Any]]:
    """The table: one row per quantity, one sequence of `length` per GPU and step, `bandwidth` bytes per second from other hosts."""
    x = SHAPES[name]
    memory = memory_per_gpu(x, gpus, length)
    traffic = traffic_per_step(x, gpus)
    table: list[dict[str, Any]] = [{"what": f"memory per GPU: {what}", "value": f"{size / 1e9:.1f} GB"} for what, size in memory.items()]
    table.append(
        {"what": "memory per GPU: together, without what one block holds while it runs", "value": f"{sum(memory.values()) / 1e9:.0f} GB"}
    )
    operations = {
        "alignment": alignment_operations(x, length, length),
        "logits": logits_operations(x, length, length, range(x.layers)),
    }
    seconds_per_token: list[float] = []
    for stage in STAGES:
        table.append({"what": f"{stage}: operations per GPU and step", "value": f"{operations[stage] / 1e12:,.0f} T"})
        table.append({"what": f"{stage}: received per GPU and step", "value": f"{traffic[stage] / 1e9:.0f} GB"})
        at = f"{traffic[stage] / bandwidth:.1f} s"
        table.append({"what": f"{stage}: time of that at {bandwidth / 1e9:.0f} GB/s (assumed)", "value": at})
        row = measured_share(rows, stage)
        if row is None:
            table.append({"what": f"{stage}: tokens per second, all GPUs", "value": MISSING})
            continue
        compute = operations[stage] / (row["matmul_rate"] * row["share_of_floor"])
        step = max(compute, traffic[stage] / bandwidth)
        seconds_per_token.append(step / (gpus * length))
        table.append({"what": f"{stage}: computing, at the {row['share_of_floor']:.0%} of the floor measured", "value": f"{compute:.1f} s"})
        table.append({"what": f"{stage}: tokens per second, all GPUs, the longer of both", "value": f"{gpus * length / step:,.0f}"})
    for tokens, label in ((20e6, "20 M"), (1e9, "1 B")):
        hours = [gpus * tokens / 2 * each / 3600 for each in seconds_per_token]  # half of the tokens for each stage
        value = f"{sum(hours):,.0f}" if len(hours) == len(STAGES) else MISSING
        table.append({"what": f"GPU-hours for {label} tokens, half in each stage", "value": value})
    return table


# --- the page ---------------------------------------------------------------------------------------------------


def measured_table(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return "Nothing measured yet."
    columns = {
        "shape": "shape",
        "stage": "stage",
        "processes": "GPUs",
        "kind": "kind",
        "batch": "sequences per GPU",
        "layer_kind": "converted layers",
        "checkpointing": "checkpointing",
        "tokens_per_second": "tokens/s",
        "peak_gib": "peak GiB",
        "share_of_floor": "floor / step",
        "share_of_parts": "parts / step",
        "speed_up": "over one GPU",
    }
    full = [row | speed_up(row, rows) | {"layer_kind": layer_kind(row)} for row in rows]
    shown = [{title: row.get(name) for name, title in columns.items()} for row in full]
    return rows_table(shown, list(columns.values()))


def layer_kind(row: dict[str, Any]) -> str:
    return "states" if row.get("states", True) else "window alone"


def speed_up(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, float]:
    """Tokens per second over those of the same measurement on one process, for rows of several."""
    alike = ("shape", "stage", "batch", "length", "checkpointing", "states")
    one = [other for other in rows if other["processes"] == 1 and all(other.get(name) == row.get(name) for name in alike)]
    return {"speed_up": row["tokens_per_second"] / one[0]["tokens_per_second"]} if one and row["processes"] > 1 else {}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Tokens per second, share of the floor and peak memory of every row."""
    labels = [f"{row['shape']} {row['stage']}, {row['processes']} × {row['kind']}, {row['batch']} seq., {layer_kind(row)}" for row in rows]
    panels = {"tokens_per_second": "tokens per second", "share_of_floor": "floor by operations / step", "peak_gib": "peak GiB per GPU"}
    drawn, axes = figure(1, len(panels), size=(14, 1 + 0.4 * len(rows)), sharey=True)
    for axis, (name, title) in zip(axes, panels.items(), strict=True):
        axis.barh(labels, [row[name] or 0 for row in rows], color=["C0" if row["stage"] == "alignment" else "C1" for row in rows])
        axis.set_xlabel(title)
        axis.grid(axis="x", alpha=0.3)
    axes[0].invert_yaxis()
    save(drawn, path)


def write_page(rows: list[dict[str, Any]], bandwidth: float, page: Path = PAGE) -> str:
    """Fill the tables of docs/scale.md, draw its plot if there are rows, and return the plan."""
    planned = rows_table(plan(rows, bandwidth), ["what", "value"])
    measured = measured_table(rows)
    if rows:
        draw(rows, page.parent / "images" / "scale.png")
        measured += "\n\n![speed, share of the floor and memory](images/scale.png)"
    fill_page(page, {"measured": measured, "plan": planned})
    return planned
