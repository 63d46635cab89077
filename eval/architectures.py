"""The table of architectures, measured: each is made small and random, converted, and compared with itself and with its base.

    python eval/architectures.py

writes eval/results/generation-architectures.json and the table in docs/architectures.md. Half a minute on a CPU.
"""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from reporting import markdown_table, write_results
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.utils import logging

from dsla_hf import DSLAConfig
from dsla_hf.architectures import ARCHITECTURES

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


def tiny(kind: str) -> Any:
    torch.manual_seed(0)
    sizes = {name: value for name, value in SIZES.items() if not (kind == "phi3" and name == "head_dim")}
    config = AutoConfig.for_model(kind, **{**sizes, **OPTIONS.get(kind, {})})
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
def measure(kind: str, folder: Path) -> dict[str, Any]:
    ids = torch.randint(2, 97, (2, 40))
    row: dict[str, Any] = {"architecture": kind}

    base = tiny(kind)
    short, expected = ids[:, :12], base(ids[:, :12]).logits
    fresh = get_peft_model(base, DSLAConfig(task_type="CAUSAL_LM", conversion_order=[2, 0, 3, 1], window_size=16)).eval()
    row["converts"] = (fresh(short).logits - expected).abs().max().item() / expected.abs().max().item()

    base = tiny(kind)
    expected = base(ids).logits
    model = adapter(base)
    with model.disable_adapter():
        row["disabled"] = torch.equal(model(ids).logits, expected)
    logits, cache = model(ids, use_cache=False).logits, DynamicCache(config=model.config)
    steps = [model(ids[:, :17], past_key_values=cache).logits]
    steps += [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(17, 40)]
    row["cached"] = (torch.cat(steps, 1) - logits).abs().max().item() / logits.abs().max().item()

    mask = torch.ones_like(ids)
    mask[0, :11] = 0
    options = {"do_sample": False, "max_new_tokens": 12}
    padded = model.generate(input_ids=ids * mask, attention_mask=mask, **options)
    alone = model.generate(input_ids=ids[:1, 11:], attention_mask=mask[:1, 11:], **options)
    row["padding"] = torch.equal(padded[:1, 40:], alone[:, 29:])
    row["static"] = torch.equal(model.generate(input_ids=ids * mask, attention_mask=mask, cache_implementation="static", **options), padded)

    model.save_pretrained(folder / "adapter")
    again = PeftModel.from_pretrained(tiny(kind), folder / "adapter").eval()
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
    for kind in tqdm(ARCHITECTURES, desc="architectures"):
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(kind, Path(folder)))
    write_results("generation-architectures", rows, "python eval/architectures.py")

    def cell(value: Any) -> Any:
        return {True: "yes", False: "no"}[value] if isinstance(value, bool) else f"{value:.0e}" if isinstance(value, float) else value

    titles = {
        "architecture": "`model_type`",
        "converts": "converts",
        "cached": "generates",
        "padding": "padded",
        "static": "static cache",
        "adapter": "adapter",
        "loads": "hybrid loads",
        "disabled": "level 0",
        "tp_plan": "TP plan",
        "notes": "notes",
    }
    shown = [{title: cell(row[name]) for name, title in titles.items()} for row in rows]
    table = markdown_table(shown, list(titles.values()))
    page = re.sub(r"(<!-- table -->\n).*?(<!-- end -->)", lambda found: f"{found[1]}{table}\n{found[2]}", PAGE.read_text(), flags=re.DOTALL)
    partial = PAGE.with_suffix(".partial")
    partial.write_text(page)
    os.replace(partial, PAGE)
    print(table)


if __name__ == "__main__":
    main()
