"""The table of architectures, measured: each is made small and random, converted, and compared with itself and with its base.

    python eval/architectures.py [MODEL_TYPE ...]
    python eval/architectures.py --checks graphs server

runs every check over every architecture (or over those named, and writes nothing then), writes eval/results/architectures.json and the
table in docs/architectures.md, and ends with an error if a check does not hold. Minutes on a CPU. With --checks it runs these alone, and
what others found stays as the result file has it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from reporting import RESULTS, fill_page, rows_table, write_results
from tqdm import tqdm
from transformers import DynamicCache
from transformers.utils import logging

from dsla_hf.inference.fusion import fused
from dsla_hf.inference.graph import GraphDecoder
from dsla_hf.inference.recorder import PlainRecording
from dsla_hf.models.architectures import ARCHITECTURES, check_draftable, head_dim_of, rotary_of
from dsla_hf.models.trial import checks
from dsla_hf.models.trial.verdict import holds
from dsla_hf.serving.engine.engine import Engine
from dsla_hf.serving.engine.levels import check_served

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
from engine_texts import SMALL, ask, prompts, run
from tiny import tiny_model_of

NO = "no"  # what is said of ways to generate that refuse a base
PAGE = Path(__file__).parent.parent / "docs" / "architectures.md"
# Rows of the table: an architecture, and options of its config beside those that small models of the tests have.
ROWS: list[tuple[str, dict[str, Any]]] = [(kind, {}) for kind in ARCHITECTURES]
ROWS.insert(1 + list(ARCHITECTURES).index("phi3"), ("phi3", {"partial_rotary_factor": 0.75}))
PER_LAYER_INPUTS = {
    "attention_k_eq_v": False,
    "hidden_size_per_layer_input": 4,
    "vocab_size_per_layer_input": 97,
    "enable_moe_block": False,
}
ROWS.insert(2 + list(ARCHITECTURES).index("gemma4_text"), ("gemma4_text", {**PER_LAYER_INPUTS, "num_key_value_heads": 2}))
ROWS.insert(3 + list(ARCHITECTURES).index("starcoder2"), ("starcoder2", {"sliding_window": 12}))


def base_of(kind: str, options: dict[str, Any], uneven: bool = True) -> Any:
    torch.manual_seed(0)
    return tiny_model_of(kind, uneven, **options).requires_grad_(False)


def fused_steps(make: checks.Make, folder: Path) -> float:
    """Steps with norms, MLPs and rotations in the forms that are compiled on a GPU, here as they are written."""
    model, ids = checks.adapter(make(), level=2), checks.text()

    def decoded() -> torch.Tensor:
        return checks.pieces(model, ids, DynamicCache(config=model.get_base_model().config))

    expected = decoded()
    with fused(model, lambda function: function):
        return checks.apart(decoded(), expected)


def drafts(make: checks.Make, folder: Path) -> bool | str:
    """Text with guesses of the highest level is that without."""
    model, ids = checks.adapter(make(), level=2), checks.text(1, 20)
    try:
        check_draftable(model.config, 4)
    except ValueError:
        return NO
    return torch.equal(checks.generated(model, ids, draft_level=4, draft_tokens=3), checks.generated(model, ids))


def graphs(make: checks.Make, folder: Path) -> bool | str:
    """Steps recorded once and run again, here as they are, give the text of `generate`, twice."""
    model, ids = checks.adapter(make(), level=2), checks.text()
    decoder = GraphDecoder(model, record=PlainRecording)
    if decoder.obstacle() is not None:
        return NO
    options = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **checks.GREEDY}
    return all(torch.equal(decoder.generate(**options), checks.generated(model, ids)) for _ in range(2))


def server(make: checks.Make, folder: Path) -> bool | str:
    """The server's texts, several at a time, are those of `generate` alone."""
    model = checks.adapter(make())
    try:
        check_served(model.config)
    except ValueError:
        return NO
    engine, wanted = Engine(model, 2, SMALL), prompts(4, longest=30)
    ears = ask(engine, [(prompt, checks.GREEDY["max_new_tokens"]) for prompt in wanted])
    run(engine)
    model.set_level(2)
    return all(
        checks.generated(model, torch.tensor([prompt]))[0, len(prompt) :].tolist() == ear.tokens
        for prompt, ear in zip(wanted, ears, strict=True)
    )


CHECKS = {**checks.CHECKS, "fused": fused_steps, "drafts": drafts, "graphs": graphs, "server": server}


@torch.no_grad()
def measure(kind: str, options: dict[str, Any], names: list[str], known: dict[str, Any]) -> dict[str, Any]:
    """A row of the table, by the checks of these names; what others found is in `known`. What a check raises is in its place, in words."""
    config = base_of(kind, options).config
    layout, rotated = rotary_of(config, kind)
    row: dict[str, Any] = {"architecture": kind, "options": options}
    row["rotary"] = layout if rotated == head_dim_of(config) else f"{layout}, {rotated} of {head_dim_of(config)} channels"
    for name, check in CHECKS.items():
        if name in names:
            row[name] = checks.outcome(name, check, lambda uneven: base_of(kind, options, uneven))
        elif name in known:
            row[name] = known[name]
    row["tp_plan"] = bool(getattr(config, "base_model_tp_plan", None))
    row["notes"] = ARCHITECTURES[kind].notes
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_types", nargs="*", metavar="MODEL_TYPE", help="of these alone, and write nothing")
    parser.add_argument("--checks", nargs="+", choices=list(CHECKS), default=list(CHECKS), help="these alone")
    args = parser.parse_args()
    asked = args.model_types
    if unknown := set(asked) - set(ARCHITECTURES):
        parser.error(f"not supported: {', '.join(sorted(unknown))}; supported are {', '.join(ARCHITECTURES)}")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    wanted = [(kind, options) for kind, options in ROWS if not asked or kind in asked]
    known = found_before() if len(args.checks) < len(CHECKS) and not asked else {}
    missing = [name for kind, options in wanted for name in CHECKS if name not in {*args.checks, *known.get(place_of(kind, options), {})}]
    if missing and not asked:
        parser.error(f"the result file has not all of what is left out: add {' '.join(dict.fromkeys(missing))} to --checks")
    rows, failed = [], []
    for kind, options in tqdm(wanted, desc="architectures"):
        rows.append(measure(kind, options, args.checks, known.get(place_of(kind, options), {})))
        for name in args.checks:
            if rows[-1][name] != NO and not holds(rows[-1][name]):
                failed.append(f"{kind} {options or ''}: {name}: {rows[-1][name]}")
                tqdm.write(failed[-1])
    if not asked and not failed:
        write(rows)
    if failed:
        sys.exit(f"{len(failed)} checks do not hold; nothing is written:\n" + "\n".join(failed))


def place_of(kind: str, options: dict[str, Any]) -> str:
    return json.dumps([kind, options])


def found_before() -> dict[str, dict[str, Any]]:
    """The rows of the result file, by type and options."""
    path = RESULTS / "architectures.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    return {place_of(row["architecture"], row["options"]): row for row in rows}


def write(rows: list[dict[str, Any]]) -> None:
    """The result file, and the table made from it."""
    command, some = "python eval/architectures.py", " ".join(sys.argv[1:])
    write_results("architectures", rows, f"{command}; {command} {some}" if some else command)

    def cell(value: Any) -> Any:
        return {True: "yes", False: "no"}[value] if isinstance(value, bool) else f"{value:.0e}" if isinstance(value, float) else value

    titles = {"architecture": "`model_type`", "rotary": "rotary", **{name: name for name in CHECKS}, "tp_plan": "TP plan", "notes": "notes"}
    table = rows_table([{title: cell(row[name]) for name, title in titles.items()} for row in rows], list(titles.values()))
    fill_page(PAGE, {"table": table})
    print(table)


if __name__ == "__main__":
    main()
