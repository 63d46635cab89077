"""The table of multimodal models, measured: each is made small and random, its text model converted in place, and read with images.

    python eval/multimodal.py [MODEL_TYPE ...]
    python eval/multimodal.py --texts

runs every check over every type (or over those named, and writes nothing then), writes eval/results/multimodal.json and the table in
docs/multimodal.md, and ends with an error if a check does not hold. A minute on a CPU. With --texts LLaVA over every supported text model.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from reporting import fill_page, rows_table, write_results
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, DynamicCache, StaticCache
from transformers.utils import logging

from dsla_hf import DSLAConfig, text_model
from dsla_hf.core.cache import DSLACacheLayer
from dsla_hf.models.architectures import SUPPORTED_BASES
from dsla_hf.models.decoder import decoder_of
from dsla_hf.models.multimodal import MULTIMODAL
from dsla_hf.models.trial.checks import GREEDY, HEADS, MOST, ORDER, adapter, apart, outcome
from dsla_hf.models.trial.verdict import TOLERANCE, holds

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
from multimodal_models import IMAGE, prompt_with_images, tiny_multimodal, without_images

PAGE = Path(__file__).parent.parent / "docs" / "multimodal.md"
BLOCKS = "at level 0"  # what is said of images that are read in blocks
BEFORE, AFTER = 5, 19  # tokens before and behind an image
# Checks of what the text models' own table has: small ones slide over fewer tokens than a prompt with an image has, or move with positions.
OF_ONE_TEXT = ("converts", "packed", "shifted")
AXES = (7, 1000, 300, 70)  # by which the place in the text, time, height and width are moved


def base_of(kind: str, uneven: bool = True, over: str | None = None) -> Any:
    torch.manual_seed(0)
    return tiny_multimodal(kind, uneven, over=over).requires_grad_(False)


def prompt(model: Any, **sizes: Any) -> dict[str, torch.Tensor]:
    """Two rows with an image each; text where images are read at level 0 alone."""
    inputs = prompt_with_images(model, **{"before": BEFORE, "after": AFTER, **sizes})
    return inputs if reads_at_every_level(model) else without_images(inputs)


def reads_at_every_level(model: Any) -> bool:
    kind = model.config.model_type
    return not MULTIMODAL[model.config.base_model_type if kind == "dsla" else kind].image_blocks


def pieces(model: Any, inputs: dict[str, torch.Tensor], cache: Any, first: int) -> torch.Tensor:
    """Logits of a prompt, whose first tokens hold the image, of some tokens and of tokens one by one."""
    ids = inputs["input_ids"]
    of_tokens = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")
    start = {name: x[:, :first] if name in of_tokens else x for name, x in inputs.items()}
    parts = [ids[:, first : first + 4], *ids[:, first + 4 :].split(1, 1)]
    logits = [model(**start, past_key_values=cache).logits]
    return torch.cat([*logits, *(model(input_ids=part, past_key_values=cache).logits for part in parts)], 1)


def generated(model: Any, inputs: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    """Greedy text, without the tokens that stand for images."""
    marks = list(range(IMAGE, model.config.get_text_config().vocab_size))
    return model.generate(**inputs, **{**GREEDY, "suppress_tokens": marks, **options})


# --- checks: a bool that must be true, or a difference that must be small ---------------------------------------


def level_0(make: Callable[..., Any], folder: Path) -> bool:
    """At level 0 and with the adapter disabled it is the base, bit for bit, with images; at the highest level it is not."""
    base = make()
    images, inputs = prompt_with_images(base), prompt(base)
    expected, plain = base(**images).logits, base(**inputs).logits
    model = adapter(base)
    changed = apart(model(**inputs).logits, plain) > 1e-3
    with model.disable_adapter():
        disabled = torch.equal(model(**images).logits, expected)
    model.set_level(0)
    return changed and disabled and torch.equal(model(**images).logits, expected)


def converts(make: Callable[..., Any], folder: Path) -> float:
    """With nothing outside the window a fresh layer is the base's attention, at once and token by token behind the image."""
    base = make()
    inputs = prompt(base, before=2, after=7)
    short = inputs["input_ids"].shape[1]
    if not reads_at_every_level(base):  # whose layers slide: no longer than that
        inputs = {name: x[:, :12] for name, x in inputs.items()}
        short = 12
    expected = base(**inputs).logits
    model = get_peft_model(base, DSLAConfig(task_type="CAUSAL_LM", conversion_order=ORDER, window_size=64)).eval()
    cache = DynamicCache(config=base.config)
    steps = pieces(model, inputs, cache, short - 5)
    assert all(isinstance(layer, DSLACacheLayer) for layer in cache.layers)
    return max(apart(model(**inputs).logits, expected), apart(steps, expected))


def caches(make: Callable[..., Any], folder: Path) -> float:
    """Token by token behind the image through a cache made from the config, one made without and a static one, against the full forward;
    and that without a mask, where positions of an image could be taken for those of packed texts."""
    model, worst = adapter(make()), 0.0
    base = model.get_base_model()
    inputs = prompt(base)
    for level in (MOST, 4):
        model.set_level(level)
        expected = model(**inputs, use_cache=False).logits
        worst = max(worst, apart(model(**{**inputs, "attention_mask": None}, use_cache=False).logits, expected))
        for cache in (DynamicCache(config=base.config), DynamicCache(), StaticCache(config=base.config, max_cache_len=80)):
            worst = max(worst, apart(pieces(model, inputs, cache, inputs["input_ids"].shape[1] - AFTER + 2), expected))
    return worst


def generates(make: Callable[..., Any], folder: Path) -> bool:
    """The same text with and without a cache, and with a static one; another with other images."""
    model = adapter(make(), level=MOST)
    inputs = prompt(model.get_base_model())
    expected = generated(model, inputs, use_cache=False)
    same = all(torch.equal(generated(model, inputs, **options), expected) for options in ({}, {"cache_implementation": "static"}))
    if "pixel_values" in inputs:
        other = inputs | {"pixel_values": torch.randn_like(inputs["pixel_values"])}
        same &= apart(model(**other).logits, model(**inputs).logits) > 1e-3
    return same


def padded(make: Callable[..., Any], folder: Path) -> bool:
    """Left-padded rows with images answer as alone, behind a dynamic and a static cache."""
    model = adapter(make(), level=MOST)
    base = model.get_base_model()
    rows = [prompt(base, rows=1, after=12), prompt(base, rows=1, before=9)]
    length = max(row["input_ids"].shape[1] for row in rows)
    together = {}
    for name in rows[0]:
        parts = [row[name] for row in rows]
        if name in ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"):
            parts = [torch.nn.functional.pad(x, (length - x.shape[1], 0)) for x in parts]
        together[name] = torch.cat(parts)
    found = generated(model, together)
    alone = [generated(model, row)[:, row["input_ids"].shape[1] :] for row in rows]
    static = generated(model, together, cache_implementation="static")
    return torch.equal(found[:, length:], torch.cat(alone)) and torch.equal(static, found)


def packed(make: Callable[..., Any], folder: Path) -> float:
    """Two texts in one row, by positions that restart, as each alone, in every form of positions that the base heeds."""
    base = make()
    ids, positions = torch.randint(2, 90, (1, 40)), torch.cat([torch.arange(23), torch.arange(17)])[None]

    def change(model: Any, positions: torch.Tensor) -> float:
        expected = torch.cat([model(input_ids=part, use_cache=False).logits for part in ids.split([23, 17], 1)], 1)
        return apart(model(input_ids=ids, position_ids=positions, use_cache=False).logits, expected)

    forms = [positions, positions.expand(4, 1, -1)] if hasattr(base.model, "get_rope_index") else [positions]
    heeded = [form for form in forms if change(base, form) <= TOLERANCE]
    model = adapter(base, level=MOST)
    return max(change(model, form) for form in heeded)


def shifted(make: Callable[..., Any], folder: Path) -> float:
    """How much the logits change when positions are moved, each axis by a number of its own, in fp64 but for the angles."""
    base = make()
    base.set_experts_implementation("eager")  # others take no fp64
    model = adapter(base, half_lives=((4.0, 60.0), (2.0, 9.0))).double()
    inputs = prompt(base, after=120)
    for name, parameter in model.named_parameters():
        if name.endswith("state_bias"):
            parameter.fill_(3.0)  # states that are heard
    positions = torch.arange(inputs["input_ids"].shape[1]).expand(2, -1)
    if hasattr(base.model, "get_rope_index"):
        options = {name: x for name, x in inputs.items() if name != "pixel_values"}
        positions = torch.cat([positions[None], base.model.get_rope_index(**options)[0]])
        moved = positions + torch.tensor(AXES)[:, None, None]
    else:
        moved = positions + AXES[1]
    inputs = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    near, far = (model(**inputs, position_ids=x, use_cache=False).logits for x in (positions, moved))
    return apart(far, near)


def raised(make: Callable[..., Any], folder: Path) -> bool:
    """The image read at level 0 and the level raised twice behind it, by `generate` and by hand, and behind a static cache."""
    model = adapter(make(), level=4)
    inputs = prompt_with_images(model.get_base_model(), rows=1)
    start = inputs["input_ids"].shape[1]

    def at(tokens: int) -> int:
        return 0 if tokens < start + 3 else 2 if tokens < start + 6 else 4

    found = generated(model, inputs, level_policy=lambda stats: at(stats.tokens))
    reached = model.get_level() == 4
    static = generated(model, inputs, level_policy=lambda stats: at(stats.tokens), cache_implementation="static")
    cache, out, fresh = DynamicCache(config=model.get_base_model().config), inputs["input_ids"], inputs
    for _ in range(GREEDY["max_new_tokens"]):
        model.set_level(at(out.shape[1]))
        token = model(**fresh, past_key_values=cache).logits[:, -1:, :IMAGE].argmax(-1)
        out, fresh = torch.cat([out, token], 1), {"input_ids": token}
    return reached and torch.equal(found, out) and torch.equal(static, out)


def saved(make: Callable[..., Any], folder: Path) -> bool:
    """An adapter saved and loaded, at every level, bit for bit."""
    model = adapter(make())
    inputs = prompt(model.get_base_model())
    model.save_pretrained(folder / "adapter")
    again = PeftModel.from_pretrained(make(), folder / "adapter").eval()
    same = True
    for level in range(5):
        model.set_level(level)
        again.set_level(level)
        same &= torch.equal(again(**inputs).logits, model(**inputs).logits)
    return same


def merged(make: Callable[..., Any], folder: Path) -> bool:
    """A base that was loaded from a checkpoint, merged, saved and loaded: the same logits, bit for bit, and the same text."""
    make().save_pretrained(folder / "base")
    model = adapter(AutoModelForImageTextToText.from_pretrained(folder / "base"), level=MOST)
    inputs = prompt(model.get_base_model())
    expected = model(**inputs).logits
    hybrid = model.merge_and_unload()
    hybrid.save_pretrained(folder / "hybrid")
    loaded, report = AutoModelForImageTextToText.from_pretrained(folder / "hybrid", output_loading_info=True)
    whole = not any(report[keys] for keys in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    same = torch.equal(hybrid(**inputs).logits, expected) and torch.equal(loaded.eval()(**inputs).logits, expected)
    return whole and same and torch.equal(generated(loaded, inputs), generated(hybrid, inputs))


def gradients(make: Callable[..., Any], folder: Path) -> bool:
    """They reach every weight of the adapter, and none of the base."""
    model = adapter(make(), level=4).train()
    with torch.enable_grad():
        model(**prompt(model.get_base_model())).logits.square().mean().backward()
    return all(
        (p.grad is not None and bool(p.grad.any()) and bool(p.grad.isfinite().all())) if "dsla_" in name else p.grad is None
        for name, p in model.named_parameters()
    )


def heads(make: Callable[..., Any], folder: Path) -> float:
    """Levels that count heads: decoded against read (dynamic and static), composed against ordered, merged; and at level 0 the base."""
    base = make()
    inputs = prompt(base)
    expected = base(**inputs).logits
    model = adapter(base, conversion_unit="head", conversion_order=HEADS)
    model.set_level(0)
    worst = 0.0 if torch.equal(model(**inputs).logits, expected) else float("inf")
    config, first = base.config, inputs["input_ids"].shape[1] - AFTER + 2
    for level in (1, 3, 5):
        model.set_level(level)
        with torch.enable_grad():  # where something is trained, projections are composed anew in every forward
            expected = model(**inputs, use_cache=False).logits.detach()
        worst = max(worst, apart(model(**inputs, use_cache=False).logits, expected))
        for cache in (DynamicCache(config=config), StaticCache(config=config, max_cache_len=80)):
            worst = max(worst, apart(pieces(model, inputs, cache, first), expected))
    return max(worst, apart(model.merge_and_unload()(**inputs, use_cache=False).logits, expected))


def text(make: Callable[..., Any], folder: Path) -> bool:
    """The text model alone: logits of text bit for bit, an adapter of it on the whole and back, at every level."""
    whole = make()
    inputs = without_images(prompt_with_images(whole))
    alone = text_model(whole)
    same = torch.equal(alone(**inputs).logits, whole(**inputs).logits)
    model = adapter(alone)
    model.save_pretrained(folder / "of the text model")
    on_whole = PeftModel.from_pretrained(whole, folder / "of the text model").eval()
    on_whole.save_pretrained(folder / "of the whole")
    back = PeftModel.from_pretrained(text_model(make()), folder / "of the whole").eval()
    for level in range(5):
        for one in (model, on_whole, back):
            one.set_level(level)
        expected = model(**inputs).logits
        same &= torch.equal(on_whole(**inputs).logits, expected) and torch.equal(back(**inputs).logits, expected)
    return same


def images(make: Callable[..., Any], folder: Path) -> bool | str:
    """Prompts with images are read at every level; or refused above level 0 before anything has changed, where tokens of an image see
    those behind them."""
    model = adapter(make(), level=2)
    inputs = prompt_with_images(model.get_base_model())
    if reads_at_every_level(model.get_base_model()):
        return bool(model(**inputs).logits.isfinite().all())
    cache = DynamicCache(config=model.get_base_model().config)
    both_ways = dict.fromkeys(("full_attention", "sliding_attention"), torch.ones(1, 1, 6, 6).bool())
    calls = [
        lambda: model(**inputs, past_key_values=cache),
        lambda: model(**{name: x for name, x in inputs.items() if name != "token_type_ids"}),
        lambda: model(**{name: x for name, x in inputs.items() if name != "pixel_values"}),
        lambda: generated(model, inputs),
        lambda: generated(model, inputs, cache_implementation="static"),
        lambda: decoder_of(model.get_base_model())(inputs_embeds=torch.randn(1, 6, 32), attention_mask=both_ways),
    ]
    for call in calls:
        try:
            call()
        except ValueError:
            continue
        return False
    return BLOCKS if cache.get_seq_length() == 0 else False


CHECKS: dict[str, Callable[..., Any]] = {
    "images": images,
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
    "text": text,
}


@torch.no_grad()
def check(name: str, kind: str, over: str | None = None) -> Any:
    """What a check finds of a type, over another type of text model if one is given; what it raises, in words."""
    return outcome(name, CHECKS[name], lambda uneven: base_of(kind, uneven, over))


def fine(value: Any) -> bool:
    return value == BLOCKS or holds(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_types", nargs="*", metavar="MODEL_TYPE", help="of these alone, and write nothing")
    parser.add_argument("--texts", action="store_true", help="LLaVA over every supported text model, and write nothing")
    args = parser.parse_args()
    asked = args.model_types
    if unknown := set(asked) - set(MULTIMODAL):
        parser.error(f"not supported: {', '.join(sorted(unknown))}; supported are {', '.join(MULTIMODAL)}")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    rows, failed = [], []
    for over in tqdm(SUPPORTED_BASES, desc="text models") if args.texts else ():
        found = {name: check(name, "llava", over) for name in CHECKS if name not in OF_ONE_TEXT}
        failed += [f"llava over {over}: {name}: {value}" for name, value in found.items() if not fine(value)]
    for kind in () if args.texts else tqdm(asked or MULTIMODAL, desc="multimodal models"):
        row: dict[str, Any] = {"type": kind}
        for name in CHECKS:
            row[name] = check(name, kind)
            if not fine(row[name]):
                failed.append(f"{kind}: {name}: {row[name]}")
                tqdm.write(failed[-1])
        rows.append({**row, "notes": MULTIMODAL[kind].notes})
    if failed:
        sys.exit(f"{len(failed)} checks do not hold; nothing is written:\n" + "\n".join(failed))
    if not asked and not args.texts:
        write(rows)


def write(rows: list[dict[str, Any]]) -> None:
    """The result file, and the table made from it."""
    write_results("multimodal", rows, "python eval/multimodal.py")

    def cell(value: Any) -> Any:
        return {True: "yes", False: "no"}[value] if isinstance(value, bool) else f"{value:.0e}" if isinstance(value, float) else value

    titles = {"type": "`model_type`", **{name: name for name in CHECKS}, "notes": "notes"}
    table = rows_table([{title: cell(row[name]) for name, title in titles.items()} for row in rows], list(titles.values()))
    fill_page(PAGE, {"table": table})
    print(table)


if __name__ == "__main__":
    main()
