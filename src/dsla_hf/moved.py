"""Old names of modules, which work until 0.3: `import dsla_hf.distillation` gives `dsla_hf.training.recipe`, with a warning."""

from __future__ import annotations

import importlib
import sys
import warnings
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from types import CodeType, ModuleType
from typing import Any

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


class Moved(MetaPathFinder, Loader):
    """Finds modules by their old names. The module that an import gives is the one of the new name, not a copy."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        return spec_from_loader(fullname, self) if package == __package__ and name in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        name = self._new_name(spec.name)
        module = importlib.import_module(name)
        self._specs[spec.name] = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        spec = module.__spec__
        if spec is not None and spec.name in self._specs:  # the import has put that of the old name there
            module.__spec__ = self._specs.pop(spec.name)

    def get_code(self, fullname: str) -> CodeType:
        """For `python -m`, which runs a module under another name."""
        code = f"import runpy; runpy.run_module({self._new_name(fullname)!r}, run_name='__main__', alter_sys=True)"
        return compile(code, fullname, "exec")

    def _new_name(self, old: str) -> str:
        new = f"{__package__}.{MOVED[old.partition('.')[2]]}"
        warnings.warn(f"{old} is now {new}; the old name goes with 0.3", DeprecationWarning, stacklevel=3)
        return new

    _specs: dict[str, Any] = {}


def install() -> None:
    """Let imports by old names succeed."""
    if not any(isinstance(finder, Moved) for finder in sys.meta_path):
        sys.meta_path.insert(0, Moved())  # before the finder of files, which would find the modules of a moved package again
