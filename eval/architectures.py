"""The table of architectures, measured: each is made small and random, converted, and compared with itself and with its base.

    python eval/architectures.py

writes eval/results/generation-architectures.json and the table in docs/architectures.md. Half a minute on a CPU.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from peft import PeftModel, get_peft_model
from reporting import fill_page, rows_table, write_results
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.utils import logging

from dsla_hf import DSLAConfig
from dsla_hf.models.architectures import ARCHITECTURES, head_dim_of, rotary_of

PAGE = Path(__file__).parent.parent / "docs" / "architectures.md"
SIZES = {
    "num_hidden_layers": 4,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 97,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
LOCAL = {"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"] * 2}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
OPTIONS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "mixtral": {"sliding_window": None, **EXPERTS},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "gemma2": {**LOCAL, "attn_logit_softcapping": 2.0},
    "gemma3_text": LOCAL,
    "phi3": {"sliding_window": None},
    "smollm3": {"no_rope_layers": [1, 0, 1, 0]},
    "granite": {"attention_multiplier": 0.3},
    "cohere2": LOCAL,
    "gpt_oss": {**LOCAL, **EXPERTS},
}
# Rows of the table: an architecture, and options of its config beside those above.
ROWS: list[tuple[str, dict[str, Any]]] = [(kind, {}) for kind in ARCHITECTURES]
ROWS.insert(1 + list(ARCHITECTURES).index("phi3"), ("phi3", {"partial_rotary_factor": 0.75}))


def tiny(kind: str, options: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    sizes = {name: value for name, value in SIZES.items() if not (kind == "phi3" and name == "head_dim")}
    config = AutoConfig.for_model(kind, **{**sizes, **OPTIONS.get(kind, {}), **options})
    attention = {"attn_implementation": "eager"} if kind == "gemma2" else {}  # SDPA knows no score cap
    return AutoModelForCausalLM.from_config(config, **attention).eval()


def adapter(base: Any, **options: Any) -> Any:
    """An adapter far from its start, so that every part of it has an effect."""
    model = get_peft_model(base, DSLAConfig(task_type="CAUSAL_LM", conversion_order=[2, 0, 3, 1], window_size=8, **options))
    for name, parameter in model.named_parameters():
        if "dsla_" in name:
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@torch.no_grad()
def shifted(base: Any) -> float:
    """How much the logits change when all positions are moved by 1000, in fp64, angles of the rotary embedding too."""
    base.set_experts_implementation("eager")  # others take no fp64
    model = adapter(base, half_lives=((4.0, 60.0), (2.0, 9.0))).double()
    for name, parameter in model.named_parameters():
        if name.endswith("state_bias"):
            parameter.fill_(3.0)  # states that are heard
    ids, positions = torch.randint(2, 97, (1, 200)), torch.arange(200)[None]
    with patch.object(torch.Tensor, "float", torch.Tensor.double):
        near, far = (model(input_ids=ids, position_ids=positions + shift, use_cache=False).logits for shift in (0, 1000))
    return (far - near).abs().max().item() / near.abs().max().item()


@torch.no_grad()
def measure(kind: str, options: dict[str, Any], folder: Path) -> dict[str, Any]:
    ids = torch.randint(2, 97, (2, 40))
    row: dict[str, Any] = {"architecture": kind}

    base = tiny(kind, options)
    layout, rotated = rotary_of(base.config, kind)
    row["rotary"] = layout if rotated == head_dim_of(base.config) else f"{layout}, {rotated} of {head_dim_of(base.config)} channels"
    short, expected = ids[:, :12], base(ids[:, :12]).logits
    fresh = get_peft_model(base, DSLAConfig(task_type="CAUSAL_LM", conversion_order=[2, 0, 3, 1], window_size=16)).eval()
    row["converts"] = (fresh(short).logits - expected).abs().max().item() / expected.abs().max().item()

    base = tiny(kind, options)
    expected = base(ids).logits
    model = adapter(base)
    with model.disable_adapter():
        row["disabled"] = torch.equal(model(ids).logits, expected)
    logits, cache = model(ids, use_cache=False).logits, DynamicCache(config=model.config)
    steps = [model(ids[:, :17], past_key_values=cache).logits]
    steps += [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(17, 40)]
    row["cached"] = (torch.cat(steps, 1) - logits).abs().max().item() / logits.abs().max().item()
    row["shifted"] = shifted(tiny(kind, options))

    mask = torch.ones_like(ids)
    mask[0, :11] = 0
    greedy = {"do_sample": False, "max_new_tokens": 12}
    padded = model.generate(input_ids=ids * mask, attention_mask=mask, **greedy)
    alone = model.generate(input_ids=ids[:1, 11:], attention_mask=mask[:1, 11:], **greedy)
    row["padding"] = torch.equal(padded[:1, 40:], alone[:, 29:])
    row["static"] = torch.equal(model.generate(input_ids=ids * mask, attention_mask=mask, cache_implementation="static", **greedy), padded)

    model.save_pretrained(folder / "adapter")
    again = PeftModel.from_pretrained(tiny(kind, options), folder / "adapter").eval()
    row["adapter"] = torch.equal(again(ids).logits, logits)
    hybrid = model.merge_and_unload()
    hybrid.save_pretrained(folder / "hybrid")
    loaded = AutoModelForCausalLM.from_pretrained(folder / "hybrid", attn_implementation=hybrid.config._attn_implementation).eval()
    row["loads"] = torch.equal(loaded(ids).logits, logits)
    row["tp_plan"] = bool(getattr(hybrid.config, "base_model_tp_plan", None))
    row["notes"] = ARCHITECTURES[kind].notes
    return row


def main() -> None:
    logging.set_verbosity_error()
    rows = []
    for kind, options in tqdm(ROWS, desc="architectures"):
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(kind, options, Path(folder)))
    write_results("generation-architectures", rows, "python eval/architectures.py")

    def cell(value: Any) -> Any:
        return {True: "yes", False: "no"}[value] if isinstance(value, bool) else f"{value:.0e}" if isinstance(value, float) else value

    titles = {
        "architecture": "`model_type`",
        "rotary": "rotary",
        "converts": "converts",
        "cached": "generates",
        "shifted": "shifted",
        "padding": "padded",
        "static": "static cache",
        "adapter": "adapter",
        "loads": "hybrid loads",
        "disabled": "level 0",
        "tp_plan": "TP plan",
        "notes": "notes",
    }
    shown = [{title: cell(row[name]) for name, title in titles.items()} for row in rows]
    table = rows_table(shown, list(titles.values()))
    fill_page(PAGE, {"table": table})
    print(table)


if __name__ == "__main__":
    main()
