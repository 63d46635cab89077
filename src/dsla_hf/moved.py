"""Names that modules and their members had before 0.1.0, until 0.3: `import dsla_hf.distillation` gives `dsla_hf.training.recipe`, with a
warning."""

from __future__ import annotations

from dsla_kernels.moved import Moved

MOVED = {
    "adapter": "models.adapter",
    "architectures": "models.architectures",
    "attention": "core.attention",
    "batching": "inference.batching",
    "before_layers": "models.before_layers",
    "bench": "inference.bench.measure",
    "cache": "core.cache",
    "cards": "models.cards",
    "configuration": "models.configuration",
    "corpus": "training.text",
    "costs": "inference.bench.costs",
    "data": "training.text",
    "decode_attention": "inference.decode_attention",
    "distill_job": "cli.distill",
    "distillation": "training.recipe",
    "evaluate_job": "evaluation.harness",
    "fingerprint": "models.fingerprint",
    "fused_steps": "inference.fusion",
    "generation": "levels.generation",
    "graph": "inference.graph",
    "head_sharding": "core.head_sharding",
    "layout": "core.layout",
    "lm_eval": "evaluation.lm_eval",
    "local_datasets": "evaluation.local_datasets",
    "long_context": "evaluation.long_context",
    "losses": "training.losses",
    "masks": "core.masks",
    "measurements": "evaluation.report.measurements",
    "modeling": "models.hybrid",
    "peft_type": "compat.peft_type",
    "policies": "levels.policies",
    "published": "evaluation.report.published",
    "quantised": "models.quantised",
    "quickstart": "cli.quickstart",
    "refusals": "models.refusals",
    "report": "evaluation.report.page",
    "saving": "models.saving",
    "sensitivity": "training.ranking",
    "serving.api": "serving.http.api",
    "serving.graphs": "serving.engine.graphs",
    "serving.guards": "serving.http.guards",
    "serving.levels": "serving.engine.levels",
    "serving.metrics": "serving.http.metrics",
    "serving.page": "serving.http.page",
    "serving.pool": "serving.engine.pool",
    "serving.recent": "serving.engine.recent",
    "serving.request": "serving.engine.request",
    "serving.runner": "serving.engine.runner",
    "serving.scheduler": "serving.engine.scheduler",
    "serving.schema": "serving.http.schema",
    "serving.slots": "serving.engine.slots",
    "serving.text": "serving.engine.text",
    "serving.trace": "serving.replay.trace",
    "sharding": "training.sharding",
    "tasks": "evaluation.tasks",
    "tasks.documents": "evaluation.tasks.documents",
    "tasks.truncation": "evaluation.tasks.truncation",
    "tensor_parallel": "core.tensor_parallel",
    "training.corpus": "training.text",
    "training.data": "training.text",
}

# Of modules that keep their names: what they had before it went elsewhere, and where it is.
MEMBERS = {
    "cli": {"main": "dsla_cli.main"},
    "cli.distill": dict.fromkeys(("parse_options",), ".cli.distill_options"),
    "core.attention": {"autocast_dtype": ".core.precision", "records_steps": ".core.recording"},
    "core.cache": dict.fromkeys(("check_cache", "dsla_cache_layer", "fold"), ".core.fold"),
    "inference.bench.measure": dict.fromkeys(("PRESETS", "preset_config", "random_model", "ready"), ".inference.bench.models"),
    "inference.graph": {"Recording": ".inference.recorder"},
    "models.adapter": {
        **dict.fromkeys(("AdapterLinear", "FusedProjection"), ".models.adapter_layer"),
        "_guard_level": ".models.level_guards:guard_level",  # these two, and `_new_attention`, are in models that were pickled whole
        "_check_training_at_level_0": ".models.level_guards:check_training_at_level_0",
    },
    "models.hybrid": {
        **dict.fromkeys(("DSLAAttentionMixin", "_new_attention", "attention_config", "dsla_attention_function"), ".models.base_attention"),
        "first_layers": ".models.decoder",
    },
    "serving.engine": dict.fromkeys(("Draining", "ShedForMemory"), ".serving.engine.engine"),
    "serving.replay": dict.fromkeys(("Outcome", "summarize", "tokens_at_level"), ".serving.replay.client"),
    "training.chats": dict.fromkeys(("ShortAnswers", "measure_answers"), ".evaluation.short_answers"),
    "training.recipe": dict.fromkeys(("draw_level", "half_lives"), ".training.trainer"),
    "training.text": {"check_teaches": ".training.text_check"},
    "training.trainer": {
        **dict.fromkeys(("METHODS", "check_output", "distill"), ".training.recipe"),
        **dict.fromkeys(("FullDisk", "progress_so_far"), ".training.checkpoints"),
    },
}

# Here, so that it is in place before any of these modules is imported.
Moved(__package__, MOVED, MEMBERS).install()
