"""Fixtures of the tests of models."""

import pytest
from head_layers import ORDER


@pytest.fixture
def head_model(tiny_model, adapter_model):
    """Factory of adapters over heads, far from their start: `head_model("llama", level=3)`; `base` goes to the base's config."""

    def make(kind="llama", base=None, **config):
        config = {"conversion_unit": "head", "conversion_order": ORDER, **config}
        return adapter_model(tiny_model(kind, **(base or {})), **config)

    return make
