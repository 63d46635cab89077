"""A hybrid that `dsla merge` writes answers chats in vLLM's server as in `dsla serve`; skipped where vLLM is not installed."""

import os
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import httpx
import pytest
import torch
from peft import get_peft_model
from server import byte_tokenizer, served
from transformers import LlamaConfig, LlamaForCausalLM

from dsla_hf import DSLAConfig
from dsla_hf.cli.merge import merge
from dsla_hf.serving.command import ServeOptions, load_app

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")
pytestmark = pytest.mark.slow

SIZES = {"vocab_size": 97, "hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 4, "head_dim": 32, "num_attention_heads": 6}
SIZES |= {"num_key_value_heads": 3, "max_position_embeddings": 2048, "initializer_range": 0.2, "tie_word_embeddings": True}
SIZES |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ORDER = [[1, 0], [2, 2], [1, 2], [3, 1], [1, 1], [0, 0], [2, 0], [3, 0], [0, 1], [0, 2], [2, 1], [3, 2]]
CHATS = [
    [{"role": "user", "content": "Hello"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a level?"}],
    [{"role": "user", "content": "One"}, {"role": "assistant", "content": "Two"}, {"role": "user", "content": "and then? " * 20}],
]


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    """A model like SmolLM2 in small, with an adapter of all its heads, merged at half of them."""
    folder = tmp_path_factory.mktemp("chats")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    model.save_pretrained(folder / "base")
    byte_tokenizer(SIZES["vocab_size"]).save_pretrained(folder / "base")
    config = DSLAConfig(conversion_unit="head", conversion_order=ORDER, window_size=16, sink_tokens=2, gate_rank=4)
    adapter = get_peft_model(model, config)
    with torch.no_grad():
        for name, x in adapter.named_parameters():
            if "dsla_" in name:
                x.add_(torch.randn_like(x) * 0.1)
    adapter.save_pretrained(folder / "adapter")
    merge(str(folder / "base"), str(folder / "adapter"), "50%", str(folder / "hybrid"))
    return folder / "hybrid"


@contextmanager
def vllm_server(path, log):
    """vLLM's server in a process of its own: yields its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", path, "--served-model-name", "hybrid"]
    command += ["--port", str(port), "--dtype", "float32", "--max-model-len", "1024", "--enforce-eager"]
    with open(log, "w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"})
        try:
            deadline = time.monotonic() + 300
            while True:
                assert process.poll() is None and time.monotonic() < deadline, f"vLLM does not start:\n{log.read_text()[-6000:]}"
                try:
                    if httpx.get(f"http://127.0.0.1:{port}/health").is_success:
                        break
                except httpx.TransportError:
                    time.sleep(0.5)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(60)


def answers(address):
    """What a server says in each chat, why it ends, and the tokens of the prompt (of the answer vLLM counts the last one, too)."""
    said = []
    for chat in CHATS:
        body = {"model": "hybrid", "messages": chat, "temperature": 0, "max_tokens": 48}
        answer = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=120).raise_for_status().json()
        choice = answer["choices"][0]
        said.append((choice["message"]["content"], choice["finish_reason"], answer["usage"]["prompt_tokens"]))
    return said


def test_a_chat_is_answered_as_dsla_serve_does(hybrid, tmp_path):
    with served(load_app(ServeOptions(str(hybrid), name="hybrid", dtype="float32", max_tokens=1024))) as (_, address):
        expected = answers(address)
    assert all(len(set(text)) > 5 for text, *_ in expected), "texts that repeat one token would show nothing"
    with vllm_server(hybrid, tmp_path / "log") as address:
        assert answers(address) == expected
