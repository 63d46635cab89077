"""Names that modules had before they lay in folders, until 0.3: `import dsla_kernels.decode` gives `dsla_kernels.ops.decode`, and warns.

What finds them serves the package `dsla_hf` too.
"""

import importlib
import sys
import warnings
from collections.abc import Mapping
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import resolve_name, spec_from_loader
from types import CodeType, ModuleType
from typing import Any

MOVED = {
    "caches": "ops.softmax.caches",
    "chunk": "ops.chunk",
    "decays": "ops.states.decays",
    "decode": "ops.decode",
    "few_rows": "ops.linear.few_rows",
    "gates": "ops.states.gates",
    "prompt": "ops.softmax.prompt",
    "split_kv": "ops.softmax.decode",
    "states": "ops.states",
    "window": "ops.window",
}


class Moved(MetaPathFinder, Loader):
    """Finds modules of a package by their old names. The module that an import gives is the one of the new name, not a copy.

    Args:
        package: the name of the package.
        modules: old names and new ones, within the package.
        members: of modules that keep their names, what they had before it went to another module: its name, and that of the module as in a
            relative import, such as `.core.fold`; then a colon and its new name, if it has one.
    """

    def __init__(self, package: str, modules: Mapping[str, str], members: Mapping[str, Mapping[str, str]] | None = None):
        self.package, self.modules, self.members = package, modules, members or {}
        self._specs: dict[str, Any] = {}

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        if package != self.package:
            return None
        if name in self.modules:
            return spec_from_loader(fullname, self)
        spec = PathFinder.find_spec(fullname, path) if name in self.members else None
        if spec is not None and spec.origin is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Divided(fullname, spec.origin, package, self.members[name])
        return spec

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

    def install(self) -> None:
        """Let imports by old names succeed."""
        if not any(isinstance(finder, Moved) and finder.package == self.package for finder in sys.meta_path):
            sys.meta_path.insert(0, self)  # before the finder of files, which would find the modules of a moved package again

    def _new_name(self, old: str) -> str:
        new = f"{self.package}.{self.modules[old.partition('.')[2]]}"
        warnings.warn(f"{old} is now {new}; the old name goes with 0.3", DeprecationWarning, stacklevel=3)
        return new


class _Divided(SourceFileLoader):
    """Loads a module some of whose members are elsewhere now, and are still found in it."""

    def __init__(self, fullname: str, path: str, package: str, members: Mapping[str, str]):
        super().__init__(fullname, path)
        self.package, self.members = package, members

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        own = module.__dict__.get("__getattr__")

        def find(name: str) -> Any:
            if name in self.members:
                place, _, new = self.members[name].partition(":")
                place, new = resolve_name(place, self.package), new or name
                warnings.warn(f"{self.name}.{name} is now {place}.{new}; the old name goes with 0.3", DeprecationWarning, stacklevel=2)
                return getattr(importlib.import_module(place), new)
            if own is not None:
                return own(name)
            raise AttributeError(f"module {self.name!r} has no attribute {name!r}")

        module.__getattr__ = find  # type: ignore[method-assign]
