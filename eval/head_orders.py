"""Orders of KV heads beside one another, on one adapter whose heads are aligned and trained at no level: what is kept, and its worth.

    python eval/head_orders.py MODEL DATA --cache text.pt --adapter runs/heads-window/alignment

writes eval/results/head-orders.json, a row for each order and number of heads kept; an interrupted run goes on behind the last one. The
arguments are those of `eval/heads.py`, whose text, probes and tasks these are. `shares` are in rounds, by probe weight (`shares@1`: 1),
`single` is harm of each head alone, `entropy` the DSLA paper's (arXiv 2506.09316), `random` by chance.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import heads
from reporting import RESULTS, rows_table, write_results

from dsla_hf import rank_units, set_level
from dsla_hf.core.progress import say
from dsla_hf.core.results import origin
from dsla_hf.models.adapter import active_config
from dsla_hf.models.loading import device, load_adapter, load_tokenizer

ORDERS = ("shares@0", "shares@0.3", "shares@1", "shares@3", "single", "entropy", "random")
NAME = "head-orders"
SHOWN = ("order", "kept", "wiki", "novels", "seconds", "passes")


def settings(order: str) -> dict[str, Any]:
    """Arguments of `rank_units` by the name of an order.

    Raises:
        ValueError: for another name.
    """
    metric, _, weight = order.partition("@")
    if metric not in ("shares", "single", "entropy", "random") or (metric == "shares") != bool(weight):
        raise ValueError(f"--orders must be some of {', '.join(ORDERS)}, or shares@ with another probe weight, got {order!r}")
    return {"metric": metric} | ({"probe_weight": float(weight)} if weight else {})


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[heads.common_arguments()]
    )
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--orders", type=lambda names: names.split(","), default=list(ORDERS))
    parser.add_argument("--kept", type=lambda text: [int(part) for part in text.split(",")], default=[22, 9, 3], help="KV heads")
    parser.add_argument("--probes", type=int, default=200, help="prompts with a code, of each length")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(words)
    options.words = list(sys.argv[1:] if words is None else words)
    for order in options.orders:
        settings(order)
    sizes = heads.sizes_of(options)
    tokenizer, text = load_tokenizer(options.model), heads.read_text(options, sizes)
    on_gpu = device() == "cuda"
    model = load_adapter(options.model, str(options.adapter), "bfloat16" if on_gpu else "float32").to(device()).eval()
    config = active_config(model)
    if config.conversion_unit != "head":
        raise ValueError(f"{options.adapter} counts layers: give an adapter of heads")
    units = model.config.num_hidden_layers * config.kv_heads
    if wrong := [kept for kept in options.kept if not 0 <= kept < units]:
        raise ValueError(f"--kept must be numbers of KV heads from 0 to below {units}, got {wrong}")

    about = {"probes": options.probes, "seed": options.seed, "window": config.window_size, "states": config.states}
    file, rows = options.results / f"{NAME}.json", list[dict[str, Any]]()
    if file.exists():
        before = json.loads(file.read_text())
        if changed := [name for name, value in about.items() if before.get(name) != value]:
            raise ValueError(f"{file} was measured with another {', '.join(changed)}: name another --results")
        rows = before["rows"]
    batches, probes = heads.ranking_rows(text, sizes), heads.ranking_probes(tokenizer, text, sizes)
    tasks = heads.make_tasks(tokenizer, text, sizes, options.probes, options.seed)
    for order in options.orders:
        left = [kept for kept in options.kept if not any((row["order"], row["kept"]) == (order, kept) for row in rows)]
        if not left:
            continue
        start = time.perf_counter()
        ranking = rank_units(model, batches, probes, seed=options.seed, **settings(order))
        ranked = {"seconds": round(time.perf_counter() - start, 1), "passes": ranking.passes, "tokens": ranking.tokens}
        model.set_conversion_order(ranking.order, ranking.scores)
        for kept in left:
            set_level(model, units - kept)
            row = {"order": order, "kept": kept, **ranked, "device": origin()["device"], **heads.measured(model, tasks)}
            rows.append(row | {"heads": [list(unit) for unit in ranking.order[units - kept :]]})
            write_results(NAME, rows, heads.command_of(options, "head_orders"), folder=options.results, **about)
            say(f"{order}, {kept} kept: wiki {row['wiki']:.3f}, code {row[f'code_{sizes.code_lengths[-1]}']:.3f}")
    codes = [f"code_{length}" for length in sizes.code_lengths]
    print(rows_table(rows, [*SHOWN[:4], *codes, *SHOWN[4:]]))


if __name__ == "__main__":
    main()
