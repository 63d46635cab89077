"""Methods of other packages, wrapped for all who call them."""

from __future__ import annotations

import functools
import inspect
import pkgutil
from collections.abc import Callable
from typing import Any

from .touches import WRAPPED

_OURS = "_dsla_callback"


def around(name: str, callback: Callable[..., Any]) -> None:
    """Call `callback(original, self, *args, **kwargs)` in place of a method (of a class method `cls` for `self`), with the name, signature
    and docstring of the original.

    name: `module:Class.method`, one of `touches.WRAPPED`. Where a module is imported anew its callback takes the place of the earlier one.

    Raises:
        KeyError: for a name that the table lacks: it says what must stay as it is, and a test looks whether it has.
    """
    if name not in WRAPPED:
        raise KeyError(f"{name} is not in compat.touches.WRAPPED: put it there, with its reason and its first parameters")
    path, _, method = name.rpartition(".")
    cls = pkgutil.resolve_name(path)
    found = inspect.getattr_static(cls, method)
    original: Any = found.__func__ if isinstance(found, classmethod) else found
    who = f"{callback.__module__}.{callback.__qualname__}"
    if vars(original).get(_OURS) == who:
        original = original.__wrapped__

    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        return callback(original, self, *args, **kwargs)

    setattr(wrapper, _OURS, who)
    setattr(cls, method, classmethod(wrapper) if isinstance(found, classmethod) else wrapper)
