"""What `dsla order` does. Everything cheap is checked before weights are loaded."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ..core.files import written_whole
from ..core.interrupts import on_interrupt
from ..core.progress import quieten_libraries
from ..models.cards import adapter_card
from ..models.configuration import unit_name
from ..models.loading import (
    check_at_least_one,
    check_convertible,
    device,
    load_adapter,
    load_config,
    load_tokenizer,
    read_adapter_config,
)
from ..training.probes import check_fits_context, make_probes
from ..training.ranking import LayerRanking, rank_layers
from ..training.recipe import OF_THE_BASE, check_ranking
from ..training.text import PackedTokens
from ..training.text_check import check_teaches
from ..training.unit_ranking import PROBE_WEIGHT, UnitRanking, check_probe_weight, rank_units


def order(
    model: str,
    adapter: str,
    data: list[str],
    *,
    unit: str | None = None,
    metric: str | None = None,
    sequences: int = 16,
    length: int = 2048,
    probes: int = 24,
    probe_length: int | None = None,
    probe_weight: float | None = None,
    ranks: int = 1,
    dtype: str = "auto",
    dry_run: bool = False,
) -> LayerRanking | UnitRanking:
    """Rank the layers of an adapter by `rank_layers`, or its KV heads by `rank_units`, print them, and store the order in the adapter.

    Only its configuration and model card are written; weights belong to layers and stay as they are. The level stays; where an adapter
    that counted layers counts heads from now on, it is as many heads as those layers have.

    Args:
        data: as the sources of `text.token_blocks`; of chats everything is read.
        unit: "layer" or "head"; None: what the adapter counts.
        metric: of `rank_layers` (default "kl") or `rank_units` (default "shares").
        probes, probe_length, probe_weight, ranks: of heads: how many questions about texts of at most so many tokens (default: `length`),
            how much harm to their answers counts beside harm to text (default: 0.3), and over how many ranks of tensor parallel the order
            shall be even.

    Raises:
        ValueError: if there is too little text, the window reads nearly all of each sequence, `adapter` is no DSLA adapter of this
            model, or its weights were trained for heads and layers are to be ranked.
        OSError: if a file is missing.
        ImportError: without the `datasets` library, for other files than .txt and .jsonl.
        KeyboardInterrupt: says that the adapter is unchanged.
    """
    quieten_libraries()
    with on_interrupt(lambda: f"{adapter} is as it was"):
        config = read_adapter_config(adapter)
        base_config = load_config(model)
        check_convertible(model, base_config, config.checked_base is not None)
        unit = unit or config.conversion_unit
        if unit == "layer" and config.conversion_unit == "head":
            raise ValueError(
                f"{adapter} counts KV heads: leave --unit layer out, or distil one that counts layers (dsla distill --unit layer)"
            )
        metric = check_ranking(unit, "random", metric, probes=False)
        if unit == "layer" and ranks != 1:
            raise ValueError(f"--ranks {ranks} is of heads, and {adapter} counts layers: give --unit head, or leave it out")
        if not dry_run and not Path(adapter).is_dir():
            raise ValueError(f"{adapter} is not a folder, so the order cannot be stored in it: give a folder, or --dry-run to print only")
        probe_weight = PROBE_WEIGHT if probe_weight is None else probe_weight
        check_probe_weight(probe_weight)
        check_at_least_one("sequences", sequences)
        check_at_least_one("length", length)
        longest = probe_length or length
        tokenizer = load_tokenizer(model)
        needed = math.ceil(longest / length) if unit == "head" else 0  # sequences that the longest probe is made of
        blocks = PackedTokens.from_sources(data, tokenizer, length, max(sequences, needed) * length)
        texts = list(blocks.blocks[:sequences])
        if metric not in OF_THE_BASE:
            check_teaches(texts, config.window_size, config.sink_tokens, purpose=f"to rank {unit}s on")
        asked = []
        if unit == "head" and metric != "random":
            check_fits_context(model, base_config, longest)
            asked = make_probes(tokenizer, blocks.blocks.flatten().tolist(), longest, probes)
        tuned = load_adapter(model, adapter, dtype).to(device())
        ranking: LayerRanking | UnitRanking
        if unit == "layer":
            ranking = rank_layers(tuned, texts, metric=metric)
        else:
            ranking = rank_units(tuned, texts, asked, metric=metric, probe_weight=probe_weight, ranks=ranks)
        print(ranking_table(ranking))
        if not dry_run:
            _store(tuned, adapter, unit, ranking)
    return ranking


def _store(tuned: Any, adapter: str, unit: str, ranking: LayerRanking | UnitRanking) -> None:
    config = tuned.peft_config["default"]
    if unit != config.conversion_unit:
        config.level = (config.level or 0) * config.kv_heads
        config.conversion_unit, config.conversion_order, config.level_metrics = unit, sorted(ranking.order), None
    tuned.base_model.set_conversion_order(ranking.order, ranking.scores)
    with written_whole(Path(adapter)) as temporary:
        config.save_pretrained(str(temporary))
        (temporary / "README.md").write_text(adapter_card(config, tuned.get_base_model()))
    print(f"order stored in {adapter}; its level stays {config.level}{' heads' if unit == 'head' else ''}")


def ranking_table(ranking: LayerRanking | UnitRanking) -> str:
    """The ranking for a terminal."""
    if isinstance(ranking, UnitRanking):
        unit, heading = "head", {"shares": "share of kl", "single": "kl of it alone"}.get(ranking.metric, ranking.metric)
    else:
        unit, heading = "layer", {"kl": "kl of it alone", "greedy": "kl up to it", "entropy": "entropy"}[ranking.metric]
    lines = [f"{unit:>6}  {heading:>15}    ({ranking.tokens:,} tokens read {ranking.passes} times, least harmful first)"]
    scores: Any = ranking.scores
    lines += [f"{unit_name(one):>6}  {scores[one]:>15.6f}" for one in ranking.order]
    return "\n".join([*lines, *([] if unit == "head" else [f"order: {ranking.order}"])])
