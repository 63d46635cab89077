"""What tests of the server share as fixtures."""

import pytest
from server import byte_tokenizer


@pytest.fixture
def saved(tmp_path, tiny_model, adapter_model):
    """Folders of a checkpoint with its tokenizer, and of an adapter of it."""
    base = tiny_model("llama")
    base.save_pretrained(tmp_path / "my-base")
    byte_tokenizer().save_pretrained(tmp_path / "my-base")
    adapter_model(base).save_pretrained(tmp_path / "my-adapter")
    return str(tmp_path / "my-base"), str(tmp_path / "my-adapter")


@pytest.fixture
def in_blocks(monkeypatch):
    """Calls read keys and values in their blocks, in plain PyTorch: what is tested is what surrounds the kernels."""
    for name in ("can_attend_where_cached", "uses_triton"):
        monkeypatch.setattr(f"dsla_hf.serving.engine.runner.{name}", lambda *args: True)
