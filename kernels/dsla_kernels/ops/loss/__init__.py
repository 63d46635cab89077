"""Terms of training losses."""

from .divergence import divergence

__all__ = ["divergence"]
