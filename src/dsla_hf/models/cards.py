"""Model cards of adapters and hybrids."""

from __future__ import annotations

from typing import Any

from ..levels.table import card_table, warnings
from .configuration import DSLAConfig, unit_name

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

Dual-State Linear Attention ([arXiv 2506.09316](https://arxiv.org/abs/2506.09316)) weights for {units} {layers} of `{base}`, least
harmful first{scored}. Level L runs the first L of them with constant memory; level 0 is the original model. Saved at level {level}.

```python
import dsla_hf  # registers DSLA with PEFT
from peft import PeftModel
from transformers import {auto_class}

model = {auto_class}.from_pretrained("{base}")
model = PeftModel.from_pretrained(model, "path/to/this/adapter")
model.set_level({level})  # 0 to {depth}, at any time, also while text is generated
```

{metrics}Window size {window}, {base_type} base. Made with [dsla-hf](https://pypi.org/project/dsla-hf), format {version}.
"""

_HYBRID = """Needs the package: `pip install dsla-hf`, and `import dsla_hf` before `AutoModelForCausalLM` loads it. The base's own class (as
`LlamaForCausalLM`) would make another model of it.

# Hybrid of {base}

{units} {layers} are Dual-State Linear Attention ([arXiv 2506.09316](https://arxiv.org/abs/2506.09316)): constant memory, O(T) time. The
others are the softmax attention of the {base_type} base.

```python
import dsla_hf  # registers the architecture
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/model")
```

Where the package is installed, `trust_remote_code=True` loads it without the import. Window size {window}. Made with
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


def adapter_card(config: DSLAConfig, model_config: Any = None) -> str:
    """The README.md of an adapter directory."""
    order = config.conversion_order or []
    level = len(order) if config.level is None else config.level
    auto_class, pipeline = _TASKS.get(config.task_type or "", _CAUSAL_LM)
    return _HEADER.format(library="peft", base=_base(config, model_config), pipeline=pipeline) + _ADAPTER.format(
        base=_base(config, model_config),
        auto_class=auto_class,
        units=_units(config),
        layers=_layers(config),
        scored=" (in brackets: the measured harm of converting it)" if config.order_scores else "",
        level=level,
        depth=len(order),
        metrics=_metrics(config),
        window=config.window_size,
        base_type=config.base_model_type,
        version=config.format_version,
    )


def hybrid_card(config: DSLAConfig) -> str:
    """The README.md of a hybrid's directory."""
    base = _base(config)  # not the model's own name, which is the hybrid's
    return _HEADER.format(library="transformers", base=base, pipeline=_CAUSAL_LM[1]) + _HYBRID.format(
        base=base,
        units=_units(config)[0].upper() + _units(config)[1:],
        layers=", ".join(map(unit_name, sorted((config.conversion_order or [])[: config.level]))),
        window=config.window_size,
        base_type=config.base_model_type,
        version=config.format_version,
    )


def _base(config: DSLAConfig, model_config: Any = None) -> str:
    return config.base_model_name_or_path or getattr(model_config, "name_or_path", "") or f"a {config.base_model_type} model"


def _units(config: DSLAConfig) -> str:
    return "layers" if config.conversion_unit == "layer" else "attention heads (layer.KV head)"


def _layers(config: DSLAConfig) -> str:
    """The layers in their order, with what was measured of each where that is known: '3 (0.0012), 1 (0.004)'."""
    scores = config.order_scores or {}
    return ", ".join(f"{name} ({scores[name]:.3g})" if name in scores else name for name in map(unit_name, config.conversion_order or ()))


def _metrics(config: DSLAConfig) -> str:
    """The levels that were measured, and what is wrong with them."""
    metrics = config.level_metrics or {}
    rows = [{"level": int(level), **row} for level, row in metrics.items() if "perplexity" in row]
    said = "".join(f"**{line[0].upper()}{line[1:].partition(': ')[0]}.**\n\n" for line in warnings(rows))
    return card_table(metrics) + said
