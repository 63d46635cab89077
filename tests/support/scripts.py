"""Scripts of eval/ as modules."""

import importlib.util
import sys
from contextlib import contextmanager
from pathlib import Path

EVAL = Path(__file__).resolve().parents[2] / "eval"


@contextmanager
def loaded_script(path):
    """The script at `path` below eval/, under a name that nothing else has; what it adds to the places of modules is taken back."""
    before, name = list(sys.path), f"script_{Path(path).stem}"
    spec = importlib.util.spec_from_file_location(name, EVAL / path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look there
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path[:] = before
        del sys.modules[name]
