"""The checks that every supported architecture passes: a small random model is converted, and compared with itself and with its base.

Each takes a function that makes the base anew, and a folder for files. It returns a bool that must be true, a difference relative to the
largest logit that must be small, or in words why there is nothing to compare.
"""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from ...compat.attributes import attention_implementation
from ...core.cache import DSLACacheLayer
from ..architectures import convertible_layers, has_linear_layers
from ..configuration import DSLAConfig
from ..decoder import attentions_of, decoder_layers
from .verdict import MOVES, NOT_PACKED, TOLERANCE

Make = Callable[..., Any]

# Places among the layers that can be converted, of which a small model has four, with two KV heads or more.
ORDER = (2, 0, 3, 1)
MOST = 3  # of layers that slide and of those that see all some are converted, and a softmax layer is left
HEADS = ((2, 0), (0, 1), (3, 0), (3, 1), (1, 1), (0, 0), (2, 1), (1, 0))
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 10, "eos_token_id": None}
# Weights of norms behind the rotary embedding, when uneven, make the base's own scores depend on where a text begins.
WITH_EVEN_WEIGHTS = ("shifted",)


def outcome(name: str, check: Callable[[Make, Path], Any], make: Callable[[bool], Any]) -> Any:
    """What the check of this name finds, or in words what it raises, as unknown code may. make: a new small model, whose norms have uneven
    weights or not."""
    uneven = name not in WITH_EVEN_WEIGHTS
    with tempfile.TemporaryDirectory() as folder:
        try:
            return check(lambda: make(uneven), Path(folder))
        except Exception as error:
            return f"{type(error).__name__}: {error}"


# --- what the checks share --------------------------------------------------------------------------------------


def layer_order(base: Any) -> list[int]:
    """A plan of all layers of a small model that can be converted."""
    layers = convertible_layers(base.config)
    return [layers[place] for place in ORDER]


def adapter(base: Any, **options: Any) -> Any:
    """An adapter far from its start, so that every part of it has an effect."""
    config = {"task_type": "CAUSAL_LM", "conversion_order": layer_order(base), "window_size": 8, **options}
    model = get_peft_model(base, DSLAConfig(**config))
    for name, parameter in model.named_parameters():
        if "dsla_" in name:
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the largest logit."""
    return (found - expected).abs().max().item() / expected.abs().max().item()


def text(rows: int = 2, tokens: int = 40) -> torch.Tensor:
    """Token ids `[rows, tokens]`."""
    return torch.randint(2, 97, (rows, tokens))


def pieces(model: Any, ids: torch.Tensor, cache: Any) -> torch.Tensor:
    """Logits of a prompt and of tokens one by one behind it."""
    parts = [ids[:, :17], ids[:, 17:22], *ids[:, 22:].split(1, 1)]
    return torch.cat([model(part, past_key_values=cache).logits for part in parts], 1)


def generated(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
    """Greedy text `[rows, tokens]` behind `ids`."""
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(input_ids=ids, attention_mask=mask, **{**GREEDY, **options})


def new_caches(config: Any) -> list[Any]:
    """One of each kind that takes the place of what `generate` makes. Linear layers of a base need one made from its config."""
    without = [] if has_linear_layers(config) else [DynamicCache()]
    return [DynamicCache(config=config), *without, StaticCache(config=config, max_cache_len=48)]


@contextmanager
def all_in_fp64(conversions: bool) -> Iterator[None]:
    """Within it what models compute in fp32 whatever their dtype, as rotary embeddings, is computed in fp64: where they ask for it by
    `float()`, and with `conversions` by `to(torch.float32)`."""
    to: Any = torch.Tensor.to

    def doubled(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        given = [torch.float64 if y is torch.float32 else y for y in args]
        return to(x, *given, **{name: torch.float64 if y is torch.float32 else y for name, y in kwargs.items()})

    with patch.object(torch.Tensor, "float", torch.Tensor.double), patch.object(torch.Tensor, "to", doubled if conversions else to):
        yield


@contextmanager
def without_linear_layers(model: Any) -> Iterator[None]:
    """Within it what else in decoder layers reads earlier tokens gives nothing to them."""
    mixers = [
        child
        for layer, attention in zip(decoder_layers(model), attentions_of(model), strict=True)
        for child in layer.children()
        if child is not attention and {"cache_params", "past_key_values"} & inspect.signature(child.forward).parameters.keys()
    ]
    handles = [mixer.register_forward_hook(lambda module, args, output: torch.zeros_like(output)) for mixer in mixers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# --- the checks -------------------------------------------------------------------------------------------------


def level_0(make: Make, folder: Path) -> bool:
    """At level 0 and with the adapter disabled it is the base, bit for bit; at the highest level it is not."""
    base, ids = make(), text()
    expected = base(ids).logits
    model = adapter(base)
    changed = apart(model(ids).logits, expected) > 1e-3
    with model.disable_adapter():
        disabled = torch.equal(model(ids).logits, expected)
    model.set_level(0)
    return changed and disabled and torch.equal(model(ids).logits, expected)


def converts(make: Make, folder: Path) -> float:
    """With nothing outside the window a fresh layer is the base's attention, at once and token by token."""
    base, ids = make(), text(2, 12)
    expected = base(ids).logits
    model = get_peft_model(base, DSLAConfig(task_type="CAUSAL_LM", conversion_order=layer_order(base), window_size=16)).eval()
    cache = DynamicCache(config=base.config)
    steps = [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(12)]
    assert all(isinstance(cache.layers[i], DSLACacheLayer) for i in layer_order(base))
    return max(apart(model(ids).logits, expected), apart(torch.cat(steps, 1), expected))


def caches(make: Make, folder: Path) -> float:
    """Token by token through a cache made from the config, one made without and a static one, against the full forward."""
    model, ids, worst = adapter(make()), text(), 0.0
    config = model.get_base_model().config
    for level in (MOST, 4):
        model.set_level(level)
        expected = model(ids, use_cache=False).logits
        for cache in new_caches(config):
            worst = max(worst, apart(pieces(model, ids, cache), expected))
    return worst


def generates(make: Make, folder: Path) -> bool:
    """The same text with and without a cache, and with a static one."""
    model, ids = adapter(make(), level=MOST), text()
    expected = generated(model, ids, use_cache=False)
    ways: list[dict[str, Any]] = [{}, {"cache_implementation": "static"}]
    return all(torch.equal(generated(model, ids, **options), expected) for options in ways)


def padded(make: Make, folder: Path) -> bool:
    """Left-padded rows answer as alone, behind a dynamic and a static cache."""
    model, ids = adapter(make(), level=MOST), text(2, 30)
    mask = torch.ones_like(ids)
    mask[0, :11] = 0
    together = generated(model, ids * mask, mask)
    alone = torch.cat([generated(model, ids[:1, 11:])[:, 19:], generated(model, ids[1:])[:, 30:]])
    return torch.equal(together[:, 30:], alone) and torch.equal(generated(model, ids * mask, mask, cache_implementation="static"), together)


def packed(make: Make, folder: Path) -> float | str:
    """Two texts in one row, by positions that restart, as each alone. Where the base itself reads them as one text, that is said instead,
    if a model of DSLA layers alone keeps them apart, or one without the base's linear layers."""
    base, ids = make(), text(1, 40)
    positions = torch.cat([torch.arange(23), torch.arange(17)])[None]

    def change(model: Any) -> float:
        expected = torch.cat([model(part, use_cache=False).logits for part in ids.split([23, 17], 1)], 1)
        return apart(model(ids, position_ids=positions, use_cache=False).logits, expected)

    if change(base) <= TOLERANCE:
        return change(adapter(base, level=MOST))
    with without_linear_layers(base):
        found = change(adapter(base, level=MOST if change(base) <= TOLERANCE else 4))
    return NOT_PACKED if found <= TOLERANCE else found


def shifted(make: Make, folder: Path) -> float | str:
    """How much the logits change when all positions are moved by 1000, in fp64, angles of the rotary embedding too. Where the base's own
    logits do, that is said instead."""
    ids, positions = text(1, 200), torch.arange(200)[None]

    def change(model: Any) -> float:
        for name, parameter in model.double().named_parameters():
            if name.endswith("state_bias"):
                parameter.fill_(3.0)  # states that are heard

        def at(shift: int) -> torch.Tensor:
            return model(input_ids=ids, position_ids=positions + shift, use_cache=False).logits

        try:
            with all_in_fp64(conversions=False):
                return apart(at(1000), at(0))
        except RuntimeError:  # its rotary embedding takes both ways at once
            with all_in_fp64(conversions=True):
                return apart(at(1000), at(0))

    bases = [make() for _ in range(2)]
    for base in bases:
        base.set_experts_implementation("eager")  # others take no fp64
    if change(bases[0]) > TOLERANCE:
        return MOVES
    return change(adapter(bases[1], half_lives=((4.0, 60.0), (2.0, 9.0))))


def raised(make: Make, folder: Path) -> bool:
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


def saved(make: Make, folder: Path) -> bool:
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


def merged(make: Make, folder: Path) -> bool:
    """Merged, saved and loaded: the same logits, bit for bit, and the same text."""
    model, ids = adapter(make(), level=MOST), text()
    expected = model(ids).logits
    hybrid = model.merge_and_unload()
    hybrid.save_pretrained(folder / "hybrid")
    implementation = attention_implementation(hybrid.config)
    loaded, report = AutoModelForCausalLM.from_pretrained(folder / "hybrid", attn_implementation=implementation, output_loading_info=True)
    whole = not any(report[keys] for keys in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    same = torch.equal(hybrid(ids).logits, expected) and torch.equal(loaded.eval()(ids).logits, expected)
    return whole and same and torch.equal(generated(loaded, ids), generated(hybrid, ids))


def gradients(make: Make, folder: Path) -> bool:
    """They reach every weight of the adapter, and none of the base."""
    model = adapter(make(), level=4).train()
    with torch.enable_grad():
        model(text()).logits.square().mean().backward()
    return all(
        (p.grad is not None and bool(p.grad.any()) and bool(p.grad.isfinite().all())) if "dsla_" in name else p.grad is None
        for name, p in model.named_parameters()
    )


def heads(make: Make, folder: Path) -> float:
    """Levels that count heads: decoded against read (dynamic and static), with buffers in the order of conversion against composed
    projections, merged; and at level 0 the base."""
    base, ids, worst = make(), text(), 0.0
    layers, expected = convertible_layers(base.config), base(ids).logits
    model = adapter(base, conversion_unit="head", conversion_order=[(layers[place], head) for place, head in HEADS])
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
}
