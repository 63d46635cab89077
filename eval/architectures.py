"""The table of architectures, measured: each is made small and random, converted, and compared with itself and with its base.

    python eval/architectures.py [MODEL_TYPE ...]

runs every check over every architecture (or over those named, and writes nothing then), writes eval/results/architectures.json and the
table in docs/architectures.md, and ends with an error if a check does not hold. Minutes on a CPU.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from peft import PeftModel, get_peft_model
from reporting import fill_page, rows_table, write_results
from tqdm import tqdm
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache
from transformers.utils import logging

from dsla_hf import DSLAConfig
from dsla_hf.core.cache import DSLACacheLayer
from dsla_hf.inference.fusion import fused
from dsla_hf.models.architectures import ARCHITECTURES, head_dim_of, rotary_of

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
from tiny import tiny_model_of

PAGE = Path(__file__).parent.parent / "docs" / "architectures.md"
# Rows of the table: an architecture, and options of its config beside those that small models of the tests have.
ROWS: list[tuple[str, dict[str, Any]]] = [(kind, {}) for kind in ARCHITECTURES]
ROWS.insert(1 + list(ARCHITECTURES).index("phi3"), ("phi3", {"partial_rotary_factor": 0.75}))
ROWS.insert(2 + list(ARCHITECTURES).index("starcoder2"), ("starcoder2", {"sliding_window": 12}))
ORDER = [2, 0, 3, 1]
MOST = 3  # of layers that slide and of those that see all some are converted, and a softmax layer is left
HEADS = [[2, 0], [0, 1], [3, 0], [3, 1], [1, 1], [0, 0], [2, 1], [1, 0]]
GREEDY = {"do_sample": False, "max_new_tokens": 10, "eos_token_id": None}
MOVES, NOT_PACKED = "moves the base, too", "not in the base"
TOLERANCE = 1e-4  # of the largest logit, in fp32; what sums in another order is far below


def base_of(kind: str, options: dict[str, Any], uneven: bool = True) -> Any:
    torch.manual_seed(0)
    return tiny_model_of(kind, uneven, **options).requires_grad_(False)


def adapter(base: Any, **options: Any) -> Any:
    """An adapter far from its start, so that every part of it has an effect."""
    config = {"task_type": "CAUSAL_LM", "conversion_order": ORDER, "window_size": 8, **options}
    model = get_peft_model(base, DSLAConfig(**config))
    for name, parameter in model.named_parameters():
        if "dsla_" in name:
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the largest logit."""
    return (found - expected).abs().max().item() / expected.abs().max().item()


def text(rows: int = 2, tokens: int = 40) -> torch.Tensor:
    return torch.randint(2, 97, (rows, tokens))


def pieces(model: Any, ids: torch.Tensor, cache: Any) -> torch.Tensor:
    """Logits of a prompt and of tokens one by one behind it."""
    parts = [ids[:, :17], ids[:, 17:22], *ids[:, 22:].split(1, 1)]
    return torch.cat([model(part, past_key_values=cache).logits for part in parts], 1)


def generated(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(input_ids=ids, attention_mask=mask, **{**GREEDY, **options})


# --- checks: a bool that must be true, or a difference that must be small ---------------------------------------


def level_0(make: Callable[..., Any], folder: Path) -> bool:
    """At level 0 and with the adapter disabled it is the base, bit for bit; at the highest level it is not."""
    base, ids = make(), text()
    expected = base(ids).logits
    model = adapter(base)
    changed = apart(model(ids).logits, expected) > 1e-3
    with model.disable_adapter():
        disabled = torch.equal(model(ids).logits, expected)
    model.set_level(0)
    return changed and disabled and torch.equal(model(ids).logits, expected)


def converts(make: Callable[..., Any], folder: Path) -> float:
    """With nothing outside the window a fresh layer is the base's attention, at once and token by token."""
    base, ids = make(), text(2, 12)
    expected = base(ids).logits
    model = get_peft_model(base, DSLAConfig(task_type="CAUSAL_LM", conversion_order=ORDER, window_size=16)).eval()
    cache = DynamicCache(config=base.config)
    steps = [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(12)]
    assert all(isinstance(layer, DSLACacheLayer) for layer in cache.layers)
    return max(apart(model(ids).logits, expected), apart(torch.cat(steps, 1), expected))


def caches(make: Callable[..., Any], folder: Path) -> float:
    """Token by token through a cache made from the config, one made without and a static one, against the full forward."""
    model, ids, worst = adapter(make()), text(), 0.0
    config = model.get_base_model().config
    for level in (MOST, 4):
        model.set_level(level)
        expected = model(ids, use_cache=False).logits
        for cache in (DynamicCache(config=config), DynamicCache(), StaticCache(config=config, max_cache_len=48)):
            worst = max(worst, apart(pieces(model, ids, cache), expected))
    return worst


def generates(make: Callable[..., Any], folder: Path) -> bool:
    """The same text with and without a cache, and with a static one."""
    model, ids = adapter(make(), level=MOST), text()
    expected = generated(model, ids, use_cache=False)
    return all(torch.equal(generated(model, ids, **options), expected) for options in ({}, {"cache_implementation": "static"}))


def padded(make: Callable[..., Any], folder: Path) -> bool:
    """Left-padded rows answer as alone, behind a dynamic and a static cache."""
    model, ids = adapter(make(), level=MOST), text(2, 30)
    mask = torch.ones_like(ids)
    mask[0, :11] = 0
    together = generated(model, ids * mask, mask)
    alone = torch.cat([generated(model, ids[:1, 11:])[:, 19:], generated(model, ids[1:])[:, 30:]])
    return torch.equal(together[:, 30:], alone) and torch.equal(generated(model, ids * mask, mask, cache_implementation="static"), together)


def packed(make: Callable[..., Any], folder: Path) -> float | str:
    """Two texts in one row, by positions that restart, as each alone. Where the base itself reads them as one text, that is said instead,
    if a model of DSLA layers alone keeps them apart."""
    base, ids = make(), text(1, 40)
    positions = torch.cat([torch.arange(23), torch.arange(17)])[None]

    def change(model: Any) -> float:
        expected = torch.cat([model(part, use_cache=False).logits for part in ids.split([23, 17], 1)], 1)
        return apart(model(ids, position_ids=positions, use_cache=False).logits, expected)

    heeded = change(base) <= TOLERANCE
    model = adapter(base, level=MOST if heeded else 4)
    found = change(model)
    return NOT_PACKED if not heeded and found <= TOLERANCE else found


def shifted(make: Callable[..., Any], folder: Path) -> float | str:
    """How much the logits change when all positions are moved by 1000, in fp64, angles of the rotary embedding too. Where the base's own
    logits do, that is said instead."""
    ids, positions = text(1, 200), torch.arange(200)[None]

    def change(model: Any) -> float:
        for name, parameter in model.double().named_parameters():
            if name.endswith("state_bias"):
                parameter.fill_(3.0)  # states that are heard
        with patch.object(torch.Tensor, "float", torch.Tensor.double):
            near, far = (model(input_ids=ids, position_ids=positions + shift, use_cache=False).logits for shift in (0, 1000))
        return apart(far, near)

    bases = [make() for _ in range(2)]
    for base in bases:
        base.set_experts_implementation("eager")  # others take no fp64
    if change(bases[0]) > TOLERANCE:
        return MOVES
    return change(adapter(bases[1], half_lives=((4.0, 60.0), (2.0, 9.0))))


def raised(make: Callable[..., Any], folder: Path) -> bool:
    """The level raised twice in mid-text, by `generate` and by hand, and behind a static cache."""
    model, ids = adapter(make(), level=4), text(1, 20)

    def at(tokens: int) -> int:
        return 0 if tokens < 23 else 2 if tokens < 26 else 4

    found = generated(model, ids, level_policy=lambda stats: at(stats.tokens))
    reached = model.get_level() == 4
    static = generated(model, ids, level_policy=lambda stats: at(stats.tokens), cache_implementation="static")
    cache, out, fresh = DynamicCache(config=model.get_base_model().config), ids, ids
    for _ in range(GREEDY["max_new_tokens"]):
        model.set_level(at(out.shape[1]))
        fresh = model(fresh, past_key_values=cache).logits[:, -1:].argmax(-1)
        out = torch.cat([out, fresh], 1)
    return reached and torch.equal(found, out) and torch.equal(static, out)


def saved(make: Callable[..., Any], folder: Path) -> bool:
    """An adapter saved and loaded, at every level, bit for bit."""
    model, ids = adapter(make()), text()
    model.save_pretrained(folder / "adapter")
    again = PeftModel.from_pretrained(make(), folder / "adapter").eval()
    same = True
    for level in range(5):
        model.set_level(level)
        again.set_level(level)
        same &= torch.equal(again(ids).logits, model(ids).logits)
    return same


def merged(make: Callable[..., Any], folder: Path) -> bool:
    """Merged, saved and loaded: the same logits, bit for bit, and the same text."""
    model, ids = adapter(make(), level=MOST), text()
    expected = model(ids).logits
    hybrid = model.merge_and_unload()
    hybrid.save_pretrained(folder / "hybrid")
    implementation = hybrid.config._attn_implementation
    loaded, report = AutoModelForCausalLM.from_pretrained(folder / "hybrid", attn_implementation=implementation, output_loading_info=True)
    whole = not any(report[keys] for keys in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    same = torch.equal(hybrid(ids).logits, expected) and torch.equal(loaded.eval()(ids).logits, expected)
    return whole and same and torch.equal(generated(loaded, ids), generated(hybrid, ids))


def gradients(make: Callable[..., Any], folder: Path) -> bool:
    """They reach every weight of the adapter, and none of the base."""
    model = adapter(make(), level=4).train()
    with torch.enable_grad():
        model(text()).logits.square().mean().backward()
    return all(
        (p.grad is not None and bool(p.grad.any()) and bool(p.grad.isfinite().all())) if "dsla_" in name else p.grad is None
        for name, p in model.named_parameters()
    )


def heads(make: Callable[..., Any], folder: Path) -> float:
    """Levels that count heads: decoded against read (dynamic and static), with buffers in the order of conversion against composed
    projections, merged; and at level 0 the base."""
    base, ids, worst = make(), text(), 0.0
    expected = base(ids).logits
    model = adapter(base, conversion_unit="head", conversion_order=HEADS)
    model.set_level(0)
    worst = 0.0 if torch.equal(model(ids).logits, expected) else float("inf")
    config = model.get_base_model().config
    for level in (1, 3, 5):
        model.set_level(level)
        with torch.enable_grad():  # where something is trained, projections are composed anew in every forward
            expected = model(ids, use_cache=False).logits.detach()
        worst = max(worst, apart(model(ids, use_cache=False).logits, expected))
        for cache in (DynamicCache(config=config), StaticCache(config=config, max_cache_len=48)):
            worst = max(worst, apart(pieces(model, ids, cache), expected))
    return max(worst, apart(model.merge_and_unload()(ids, use_cache=False).logits, expected))


def fused_steps(make: Callable[..., Any], folder: Path) -> float:
    """Steps with norms, MLPs and rotations in the forms that are compiled on a GPU, here as they are written."""
    model, ids = adapter(make(), level=2), text()

    def decoded() -> torch.Tensor:
        return pieces(model, ids, DynamicCache(config=model.get_base_model().config))

    expected = decoded()
    with fused(model, lambda function: function):
        return apart(decoded(), expected)


CHECKS: dict[str, Callable[..., Any]] = {
    "level 0": level_0,
    "converts": converts,
    "caches": caches,
    "generates": generates,
    "padded": padded,
    "packed": packed,
    "shifted": shifted,
    "raised": raised,
    "adapter": saved,
    "merged": merged,
    "gradients": gradients,
    "heads": heads,
    "fused": fused_steps,
}


def holds(value: Any) -> bool:
    return value if isinstance(value, bool) else value <= TOLERANCE if isinstance(value, float) else value in (MOVES, NOT_PACKED)


@torch.no_grad()
def measure(kind: str, options: dict[str, Any]) -> dict[str, Any]:
    """A row of the table. What a check raises is in its place, in words."""
    config = base_of(kind, options).config
    layout, rotated = rotary_of(config, kind)
    row: dict[str, Any] = {"architecture": kind, "options": options}
    row["rotary"] = layout if rotated == head_dim_of(config) else f"{layout}, {rotated} of {head_dim_of(config)} channels"
    for name, check in CHECKS.items():
        with tempfile.TemporaryDirectory() as folder:
            # Weights of norms behind the rotary embedding, when uneven, make the base's own scores depend on where a text begins.
            uneven = name != "shifted"
            try:
                row[name] = check(lambda uneven=uneven: base_of(kind, options, uneven), Path(folder))
            except Exception as error:
                row[name] = f"{type(error).__name__}: {error}"
    row["tp_plan"] = bool(getattr(config, "base_model_tp_plan", None))
    row["notes"] = ARCHITECTURES[kind].notes
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_types", nargs="*", metavar="MODEL_TYPE", help="of these alone, and write nothing")
    asked = parser.parse_args().model_types
    if unknown := set(asked) - set(ARCHITECTURES):
        parser.error(f"not supported: {', '.join(sorted(unknown))}; supported are {', '.join(ARCHITECTURES)}")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    wanted = [(kind, options) for kind, options in ROWS if not asked or kind in asked]
    rows, failed = [], []
    for kind, options in tqdm(wanted, desc="architectures"):
        rows.append(measure(kind, options))
        for name in CHECKS:
            if not holds(rows[-1][name]):
                failed.append(f"{kind} {options or ''}: {name}: {rows[-1][name]}")
                tqdm.write(failed[-1])
    if not asked and not failed:
        write(rows)
    if failed:
        sys.exit(f"{len(failed)} checks do not hold; nothing is written:\n" + "\n".join(failed))


def write(rows: list[dict[str, Any]]) -> None:
    """The result file, and the table made from it."""
    write_results("architectures", rows, "python eval/architectures.py")

    def cell(value: Any) -> Any:
        return {True: "yes", False: "no"}[value] if isinstance(value, bool) else f"{value:.0e}" if isinstance(value, float) else value

    titles = {"architecture": "`model_type`", "rotary": "rotary", **{name: name for name in CHECKS}, "tp_plan": "TP plan", "notes": "notes"}
    table = rows_table([{title: cell(row[name]) for name, title in titles.items()} for row in rows], list(titles.values()))
    fill_page(PAGE, {"table": table})
    print(table)


if __name__ == "__main__":
    main()
