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


@contextmanager
def loaded_with(path, others):
    """The same with eval/ on the path, as a script has it that imports `others` from there; modules of tests that have these names are put
    back afterwards."""
    before = {name: sys.modules.pop(name) for name in others if name in sys.modules}
    sys.path.insert(0, str(EVAL))
    try:
        with loaded_script(path) as module:
            yield module
    finally:
        sys.path.remove(str(EVAL))
        for name in others:
            sys.modules.pop(name, None)
        sys.modules.update(before)
