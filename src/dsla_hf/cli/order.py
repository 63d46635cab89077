"""What `dsla order` does. Everything cheap is checked before weights are loaded."""

from __future__ import annotations

from pathlib import Path

from ..core.files import written_whole
from ..core.interrupts import on_interrupt
from ..core.progress import quieten_libraries
from ..models.cards import adapter_card
from ..models.loading import (
    check_at_least_one,
    check_convertible,
    check_whole_layers,
    device,
    load_adapter,
    load_config,
    load_tokenizer,
    read_adapter_config,
)
from ..training.ranking import LayerRanking, rank_layers
from ..training.text import PackedTokens
from ..training.text_check import check_teaches


def order(
    model: str,
    adapter: str,
    data: list[str],
    *,
    metric: str = "kl",
    sequences: int = 16,
    length: int = 2048,
    dtype: str = "auto",
    dry_run: bool = False,
) -> LayerRanking:
    """Rank the layers of an adapter by `metric` of `rank_layers`, print them, and store the order in the adapter.

    Only its configuration and model card are written; weights belong to layers and stay as they are. The level stays.

    Args:
        data: as the sources of `text.token_blocks`; of chats everything is read.

    Raises:
        ValueError: if there is too little text, the window reads nearly all of each sequence, or `adapter` is no DSLA adapter of this
            model.
        OSError: if a file is missing.
        ImportError: without the `datasets` library, for other files than .txt and .jsonl.
        KeyboardInterrupt: says that the adapter is unchanged.
    """
    quieten_libraries()
    with on_interrupt(lambda: f"{adapter} is as it was"):
        return _order(model, adapter, data, metric, sequences, length, dtype, dry_run)


def _order(model: str, adapter: str, data: list[str], metric: str, sequences: int, length: int, dtype: str, dry_run: bool) -> LayerRanking:
    check_convertible(model, load_config(model))
    config = read_adapter_config(adapter)
    check_whole_layers("dsla order", None, adapter)
    if not dry_run and not Path(adapter).is_dir():
        raise ValueError(f"{adapter} is not a folder, so the order cannot be stored in it: give a folder, or --dry-run to print only")
    check_at_least_one("sequences", sequences)
    check_at_least_one("length", length)
    blocks = PackedTokens.from_sources(data, load_tokenizer(model), length, sequences * length)
    if metric != "entropy":
        check_teaches(blocks, config.window_size, config.sink_tokens, purpose="to rank layers on")
    tuned = load_adapter(model, adapter, dtype).to(device())
    ranking = rank_layers(tuned, list(blocks.blocks), metric=metric)
    print(ranking_table(ranking))
    if not dry_run:
        config = tuned.peft_config["default"]
        tuned.base_model.set_conversion_order(ranking.order, ranking.scores)
        with written_whole(Path(adapter)) as temporary:
            config.save_pretrained(str(temporary))
            (temporary / "README.md").write_text(adapter_card(config, tuned.config))
        print(f"order stored in {adapter}; its level stays {config.level}")
    return ranking


def ranking_table(ranking: LayerRanking) -> str:
    """The ranking for a terminal."""
    heading = {"kl": "kl of it alone", "greedy": "kl up to it", "entropy": "entropy"}[ranking.metric]
    lines = [f"{'layer':>5}  {heading:>15}    ({ranking.tokens:,} tokens read {ranking.passes} times, least harmful first)"]
    lines += [f"{layer:>5}  {ranking.scores[layer]:>15.6f}" for layer in ranking.order]
    return "\n".join([*lines, f"order: {ranking.order}"])
