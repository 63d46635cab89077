"""What was measured at each level as text: the table that `dsla distill` and `dsla quickstart` print, that of the model card, and what
is wrong with a level. Rows are dicts of numbers with a `level`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..core.tables import markdown_table, terminal_table

MOST_LEVELS = 9  # that a table of a deep model has
CACHE_LENGTHS = (2048, 8192, 32768)  # tokens, where levels count heads
KEPT_SHARES = (0.5, 0.25, 0.1, 0.03, 0)  # of the KV heads, beside level 0, where levels count heads
CLEARLY_WORSE = 1.2  # perplexity over that of level 0
ANSWERS_KEPT = 0.8  # of level 0's tokens in short answers, at least
OWN_ANSWER_KEPT = 0.5  # likewise of the answer that a level gives by itself: one wrong token at its start makes it another
# More than chance on little text: how much higher than before the training.
HARM = {"kl": 1.1, "perplexity": 1.02}
NOTICEABLE_KL = 1e-3  # nats per token: smaller harm than this is chance, whatever the factor

# Names of rows: what people read in their place, and how the number is written.
COLUMNS = {
    "kept": ("KV heads kept", "kept"),
    "perplexity": ("perplexity", "{:.3f}"),
    "untrained_perplexity": ("untrained", "{:.3f}"),
    "before_perplexity": ("before", "{:.3f}"),
    "kl": ("KL to level 0", "{:.4f}"),
    "untrained_kl": ("untrained", "{:.4f}"),
    "before_kl": ("before", "{:.4f}"),
    "answers": ("short answers", "{:.0%}"),
    "answers_kl": ("KL on them", "{:.4f}"),
    "own_answer": ("own answer", "{:.0%}"),
    "bytes_1k": ("cache at 1k tokens", "KiB"),
    "bytes_2k": ("cache at 2k tokens", "KiB"),
    "bytes_8k": ("at 8k tokens", "KiB"),
    "bytes_32k": ("at 32k tokens", "KiB"),
}
# Where a heading stands alone, as in a model card.
LONG_HEADINGS = {
    "untrained_perplexity": "perplexity untrained",
    "untrained_kl": "KL untrained",
    "before_perplexity": "perplexity before this training",
    "before_kl": "KL before this training",
    "answers": "same tokens in short answers",
    "answers_kl": "KL on short answers",
    "own_answer": "same tokens in its own answer",
    "bytes_8k": "cache at 8k tokens",
    "bytes_32k": "cache at 32k tokens",
}


def measured_levels(highest: int, most: int = MOST_LEVELS) -> list[int]:
    """At most `most` levels from 0 to `highest`, both among them, evenly spread."""
    if highest < most:
        return list(range(highest + 1))
    return [(place * highest + (most - 1) // 2) // (most - 1) for place in range(most)]


def measured_kept(units: int, highest: int) -> list[int]:
    """Levels of a plan of heads, from 0 to `highest`, of which each keeps a smaller share of the model's `units` KV heads."""
    return sorted({0, highest, *(level for share in KEPT_SHARES if (level := units - math.floor(share * units + 0.5)) < highest)})


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows for a terminal, with a column for each of `COLUMNS` that they have."""
    names = [name for name in COLUMNS if any(name in row for row in rows)]
    lines = [["level", *(COLUMNS[name][0] for name in names)]]
    lines += [[str(row["level"]), *("" if name not in row else _cell(row["level"], row, name) for name in names)] for row in rows]
    return terminal_table(lines)


def _cell(level: int, row: Mapping[str, Any], name: str) -> str:
    form = COLUMNS[name][1]
    return kept_text(int(row[name]), level + int(row[name])) if form == "kept" else written(row[name], form)


def kept_text(kept: int, units: int, of: bool = False) -> str:
    """KV heads that a level keeps of a model's `units`, and which share that is: "9 (10%)", or "9 of 90 KV heads (10%)"."""
    return f"{kept:,}{f' of {units:,} KV heads' if of else ''} ({100 * kept / units:.3g}%)"


def written(value: float, form: str) -> str:
    """A number as a table has it; of a perplexity of thousands and more, no digits behind the point."""
    if form == "KiB" and value >= 100 << 20:
        return f"{value / (1 << 20):,.0f} MiB"
    if form == "KiB":
        return f"{value / 1024:,.0f} KiB"
    return form.format(value) if abs(value) < 10_000 else f"{value:.3g}"


def card_table(metrics: Mapping[str, Mapping[str, float]]) -> str:
    """`DSLAConfig.level_metrics` for a model card; nothing of it without measurements."""
    if not metrics:
        return ""
    known = [name for name in COLUMNS if any(name in row for row in metrics.values())]
    others = [name for row in metrics.values() for name in row if name not in COLUMNS]
    names = [*known, *dict.fromkeys(others)]
    headings = [LONG_HEADINGS.get(name, COLUMNS[name][0] if name in COLUMNS else name) for name in names]
    rows = [
        [level, *("" if name not in metrics[level] else _in_card(int(level), metrics[level], name) for name in names)]
        for level in sorted(metrics, key=int)
    ]
    return markdown_table(["level", *headings], rows) + "\n\n"


def _in_card(level: int, row: Mapping[str, float], name: str) -> str:
    form = COLUMNS[name][1] if name in COLUMNS else ""
    return _cell(level, row, name) if form in ("KiB", "{:.0%}", "kept") else f"{row[name]:.4g}"


def warnings(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a user must know of levels that are worse than they should be, a line for each kind; none if all is well.

    A level is worse than it should be if the layer as it was before training does better (by a tenth in KL and at least 0.001 nats, or 2 %
    in perplexity), if its perplexity is more than 1.2 times that of level 0, or if short chats go wrong: it picks fewer than 80 % of
    level 0's tokens, or its own answer to the first question shares less than half of its tokens with level 0's. Numbers that are not
    finite count as worse.
    """
    above = [row for row in rows if row["level"]]
    base = next((row["perplexity"] for row in rows if not row["level"]), None)

    def levels(worse: Any) -> list[int]:
        return [row["level"] for row in above if worse(row)]

    def harmed(row: Mapping[str, Any], before: str) -> bool:
        known = {name: row[f"{before}_{name}"] for name in HARM if f"{before}_{name}" in row}
        allowed = {name: HARM[name] * value for name, value in known.items()}
        if "kl" in known:
            allowed["kl"] = max(allowed["kl"], known["kl"] + NOTICEABLE_KL)
        return any(not row[name] <= limit for name, limit in allowed.items())

    lines = []
    for before, what in (("untrained", "the untrained layer"), ("before", "the adapter it began with")):
        if found := levels(lambda row, before=before: harmed(row, before)):
            lines.append(
                f"{_named(found)} worse than {what}: this training has done harm there. More or other text (--data, --tokens) or a lower "
                "--learning_rate helps"
            )
    if base is not None and (found := levels(lambda row: not row["perplexity"] <= CLEARLY_WORSE * base)):
        lines.append(
            f"{_named(found)} clearly worse than level 0 (perplexity over {CLEARLY_WORSE} times as high): train on more tokens (--tokens), "
            "or stay below"
        )
    limits = {"answers": ANSWERS_KEPT, "own_answer": OWN_ANSWER_KEPT}
    if found := levels(lambda row: any(name in row and not row[name] >= least for name, least in limits.items())):
        lines.append(
            f"{_named(found)} wrong in short chats (too few of level 0's tokens, or another answer): chats in the text (--data) and "
            "more tokens help"
        )
    return lines


def _named(levels: list[int]) -> str:
    """'level 4 is', 'levels 4, 8 are'."""
    return f"level {levels[0]} is" if len(levels) == 1 else f"levels {', '.join(map(str, levels))} are"
