"""Model cards of adapters and hybrids."""

from __future__ import annotations

from typing import Any

from ..core.heads import head_map
from ..core.tables import markdown_table
from ..levels.table import CACHE_LENGTHS, card_table, kept_text, warnings, written
from .architectures import convertible_layers
from .configuration import DSLAConfig, unit_name
from .multimodal import MULTIMODAL, auto_class_of, inner_text_config, text_config_of
from .sizes import text_bytes, unit_sizes

_HEADER = """---
library_name: {library}
base_model: {base}
pipeline_tag: {pipeline}
tags:
- dsla
- linear-attention
---
"""

_ADAPTER = """Needs the package: `pip install dsla-hf`, and `import dsla_hf` before loading; without it PEFT stops with
`KeyError: 'DSLA'`.

# DSLA adapter for {base}

Dual-State Linear Attention ([arXiv 2506.09316](https://arxiv.org/abs/2506.09316)) weights for {units} of `{base}`,
{order}.
Level L runs the first L of them with constant memory; level 0 is the original model. Saved at level {level}.

```python
import dsla_hf  # registers DSLA with PEFT
from peft import PeftModel
from transformers import {auto_class}

model = {auto_class}.from_pretrained("{base}")
model = PeftModel.from_pretrained(model, "path/to/this/adapter")
model.set_level({level})  # 0 to {depth}, at any time, also while text is generated
```

{heads}{metrics}Window size {window}, {base_type} base. Made with [dsla-hf](https://pypi.org/project/dsla-hf), format {version}.
"""

_HYBRID = """Needs the package: `pip install dsla-hf`, and `import dsla_hf` before `{auto_class}` loads it. The base's own class (as
`LlamaForCausalLM`) would make another model of it.

# Hybrid of {base}

{units} are Dual-State Linear Attention ([arXiv 2506.09316](https://arxiv.org/abs/2506.09316)): constant memory, O(T) time. The
others are the softmax attention of the {base_type} base.

```python
import dsla_hf  # registers the architecture
from transformers import {auto_class}

model = {auto_class}.from_pretrained("path/to/this/model")
```

{heads}Where the package is installed, `trust_remote_code=True` loads it without the import. Window size {window}. Made with
[dsla-hf](https://pypi.org/project/dsla-hf), format {version}.
"""

# Auto class and pipeline by PEFT's task type; adapters of none are of causal LMs.
_TASKS = {
    "FEATURE_EXTRACTION": ("AutoModel", "feature-extraction"),
    "SEQ_CLS": ("AutoModelForSequenceClassification", "text-classification"),
    "TOKEN_CLS": ("AutoModelForTokenClassification", "token-classification"),
    "QUESTION_ANS": ("AutoModelForQuestionAnswering", "question-answering"),
}
_CAUSAL_LM = ("AutoModelForCausalLM", "text-generation")
_MULTIMODAL = ("AutoModelForImageTextToText", "image-text-to-text")


def adapter_card(config: DSLAConfig, model: Any = None) -> str:
    """The README.md of an adapter directory. `model`, the base that carries the adapter, tells its name, and sizes where levels count
    heads."""
    order, base = config.conversion_order or [], _base(config, getattr(model, "config", None))
    level = len(order) if config.level is None else config.level
    whole = inner_text_config(getattr(model, "config", None)) is not None or hasattr(model, "text_of")
    auto_class, pipeline = _TASKS.get(config.task_type or "", _MULTIMODAL if whole else _CAUSAL_LM)
    return _HEADER.format(library="peft", base=base, pipeline=pipeline) + _ADAPTER.format(
        base=base,
        auto_class=auto_class,
        units=_planned(config),
        order=_order(config),
        level=level,
        depth=len(order),
        heads=_heads(config, level, model),
        metrics=_metrics(config),
        window=config.window_size,
        base_type=config.base_model_type,
        version=config.format_version,
    )


def hybrid_card(config: DSLAConfig, model: Any = None) -> str:
    """The README.md of a hybrid's directory. `model`, the hybrid, tells sizes where levels count heads."""
    base = _base(config)  # not the model's own name, which is the hybrid's
    converted = sorted((config.conversion_order or [])[: config.level])
    by_layer = config.conversion_unit == "layer"
    pipeline = (_MULTIMODAL if config.base_model_type in MULTIMODAL else _CAUSAL_LM)[1]
    return _HEADER.format(library="transformers", base=base, pipeline=pipeline) + _HYBRID.format(
        base=base,
        auto_class=auto_class_of(config.base_model_type),
        units=f"Layers {', '.join(map(unit_name, converted))}" if by_layer else f"{len(converted):,} KV heads with their query heads",
        heads=_heads(config, len(converted), model),
        window=config.window_size,
        base_type=config.base_model_type,
        version=config.format_version,
    )


def _base(config: DSLAConfig, model_config: Any = None) -> str:
    return config.base_model_name_or_path or getattr(model_config, "name_or_path", "") or f"a {config.base_model_type} model"


def _planned(config: DSLAConfig) -> str:
    """The layers in their order, with what was measured of each where that is known: 'layers 3 (0.0012), 1 (0.004)'; of heads, which are
    many, their number."""
    order, scores = config.conversion_order or [], config.order_scores or {}
    if config.conversion_unit == "head":
        return f"{len(order):,} KV heads of {len(config.layers_to_transform or ())} layers"
    return "layers " + ", ".join(f"{name} ({scores[name]:.3g})" if name in scores else name for name in map(unit_name, order))


def _order(config: DSLAConfig) -> str:
    if config.conversion_unit == "head":
        return "each with the query heads that read it, least harmful first (`adapter_config.json` has the order)"
    return "least harmful first" + (" (in brackets: the measured harm of converting it)" if config.order_scores else "")


def _heads(config: DSLAConfig, level: int, model: Any) -> str:
    """Where levels count heads: how many this one keeps, which they are, and what its cache takes."""
    if config.conversion_unit == "layer" or model is None:
        return ""
    units = unit_sizes(model, config)["num_layers"]
    heads, converted = config.kv_heads, (config.conversion_order or [])[:level]
    layers, convertible = text_config_of(model.config).num_hidden_layers, convertible_layers(model.config)
    others = set(range(layers)).difference(convertible)
    said = "; `-` are layers without attention that could be converted" if others else ""
    picture = (
        f"At level {level}, {kept_text(units - level, units, of=True)} are kept: the base's softmax attention (`#`). The others are DSLA "
        f"(`.`){said}:\n\n```text\n{head_map(converted, layers, heads, others)}\n```\n\n"
    )
    if "bytes_32k" in (config.level_metrics or {}).get(str(level), {}):  # the table of what was measured has them
        return picture
    rows = [
        [str(one), kept_text(units - one, units), *(written(text_bytes(model, config, tokens, one), "KiB") for tokens in CACHE_LENGTHS)]
        for one in dict.fromkeys((0, level))
    ]
    lengths = [f"at {tokens // 1024}k tokens" for tokens in CACHE_LENGTHS]
    dtype = str(model.dtype).removeprefix("torch.")
    return f"{picture}What the cache of one text takes ({dtype}):\n\n{markdown_table(['level', 'KV heads kept', *lengths], rows)}\n\n"


def _metrics(config: DSLAConfig) -> str:
    """The levels that were measured, and what is wrong with them."""
    metrics = config.level_metrics or {}
    rows = [{"level": int(level), **row} for level, row in metrics.items() if "perplexity" in row]
    said = "".join(f"**{line[0].upper()}{line[1:].partition(': ')[0]}.**\n\n" for line in warnings(rows))
    return card_table(metrics) + said
