"""Linear layers of a few rows."""

from .few_rows import gated_linear, linears

__all__ = ["gated_linear", "linears"]
