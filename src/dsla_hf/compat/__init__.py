"""What only one feature needs of other packages: imported when that feature is used, so that nothing else breaks where it has moved.

Functions here have the names of those they stand for, or give them. tests/compat/test_compat.py fails when one of them moves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.metadata import version
from typing import Any

from torch import Tensor, nn

PACKAGES = ("torch", "transformers", "peft", "accelerate", "huggingface_hub")


@contextmanager
def needed_for(feature: str) -> Iterator[None]:
    """Imports inside are what `feature` needs.

    Raises:
        ImportError: names the feature, what is missing and the installed versions.
    """
    try:
        yield
    except ImportError as error:
        installed = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
        raise ImportError(
            f"{feature} cannot be used with the installed releases ({installed}): {error}. Everything else of dsla-hf {version('dsla-hf')} "
            "works; for this, install releases that it was tested with (constraints.txt)",
            name=error.name,
            path=error.path,
        ) from error


def align_module_device(module: nn.Module) -> AbstractContextManager[Any]:
    """Within it the weights of a module are at hand, also those that accelerate has offloaded (they lie on the meta device otherwise)."""
    if not hasattr(module, "_hf_hook"):  # accelerate's mark
        return nullcontext()
    with needed_for("a base with offloaded weights"):
        from accelerate.utils import align_module_device
    return align_module_device(module)


def dequantize_module_weight(module: Any) -> Tensor:
    """The weight of a linear layer in full precision, as it is unless it is quantised."""
    weight = getattr(module, "weight", None)
    if type(weight) is nn.Parameter and weight.is_floating_point() and not hasattr(module, "W_q"):  # the mark of HQQ
        return weight
    with needed_for("a quantised base"):
        from peft.utils.integrations import dequantize_module_weight

        return dequantize_module_weight(module)  # imports the package that quantised it


def guard_torch_init_functions() -> AbstractContextManager[Any]:
    """Within it functions of `torch.nn.init` leave parameters alone that were loaded from a checkpoint."""
    with needed_for("a hybrid"):
        from transformers.initialization import guard_torch_init_functions
    return guard_torch_init_functions()


def masks_for_generate() -> Callable[..., Any]:
    """transformers' `create_masks_for_generate`."""
    with needed_for("generate with a static cache"):
        from transformers.masking_utils import create_masks_for_generate
    return create_masks_for_generate
