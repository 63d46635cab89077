"""Model cards of adapters and hybrids."""

from __future__ import annotations

from typing import Any

from .configuration import DSLAConfig

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

Dual-State Linear Attention ([arXiv 2506.09316](https://arxiv.org/abs/2506.09316)) weights for layers {layers} of `{base}`, least
harmful first. Level L runs the first L of them with constant memory; level 0 is the original model. Saved at level {level}.

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

Layers {layers} are Dual-State Linear Attention ([arXiv 2506.09316](https://arxiv.org/abs/2506.09316)): constant memory, O(T) time. The
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
        layers=", ".join(map(str, order)),
        level=level,
        depth=len(order),
        metrics=_metrics_table(config),
        window=config.window_size,
        base_type=config.base_model_type,
        version=config.format_version,
    )


def hybrid_card(config: DSLAConfig) -> str:
    """The README.md of a hybrid's directory."""
    base = _base(config)  # not the model's own name, which is the hybrid's
    return _HEADER.format(library="transformers", base=base, pipeline=_CAUSAL_LM[1]) + _HYBRID.format(
        base=base,
        layers=", ".join(map(str, sorted(config.converted_layers))),
        window=config.window_size,
        base_type=config.base_model_type,
        version=config.format_version,
    )


def _base(config: DSLAConfig, model_config: Any = None) -> str:
    return config.base_model_name_or_path or getattr(model_config, "_name_or_path", "") or f"a {config.base_model_type} model"


def _metrics_table(config: DSLAConfig) -> str:
    """The levels and what was measured at them; without measurements, the layers each level converts."""
    order = config.conversion_order or []
    metrics = config.level_metrics or {}
    names = list(dict.fromkeys(name for row in metrics.values() for name in row))
    lines = ["| " + " | ".join(["level", "converted layers", *names]) + " |", "|" + "---|" * (2 + len(names))]
    for level in sorted(map(int, metrics)) or range(len(order) + 1):
        layers = ", ".join(map(str, order[:level])) or "none"
        values = [f"{metrics[str(level)][name]:.4g}" if name in metrics.get(str(level), {}) else "" for name in names]
        lines.append("| " + " | ".join([str(level), layers, *values]) + " |")
    return "\n".join(lines) + "\n\n"
