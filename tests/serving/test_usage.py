"""What `dsla serve` prints: lines that work as they are, and with --dry-run what would be served."""

import shlex
import shutil
import socket
import subprocess

import pytest
from engine_texts import options
from server import byte_tokenizer, served

from dsla_cli import main
from dsla_hf.serving.engine.engine import Engine, EngineOptions
from dsla_hf.serving.http.api import ApiOptions, build_app
from dsla_hf.serving.usage import address_of, how_to_use, prefixes_of

NAME = 'it\'s "mine"'  # has to be quoted for shells, JSON and Python


@pytest.mark.parametrize("chats, key", [(True, None), (False, "secret")])
def test_the_lines_work_as_they_are_printed(tiny_model, monkeypatch, capsys, chats, key):
    engine = Engine(tiny_model("llama"), 0, EngineOptions(slots=2, block_size=8, max_tokens=128))
    if key:
        monkeypatch.setenv("DSLA_API_KEY", key)
    with served(build_app(engine, byte_tokenizer(), ApiOptions(NAME, api_key=key))) as (_, address):
        said = how_to_use(address, NAME, chats=chats, key=key is not None)
        head, curl, code = said.split("\n\n")
        assert f"{address}/v1" in head and "secret" not in said
        exec(code, {})
        assert len(capsys.readouterr().out) > 1 and engine.finished["length"] + engine.finished["stop"] == 1
        if shutil.which("curl"):
            done = subprocess.run(["sh", "-c", curl], capture_output=True, text=True, timeout=60)
            assert '"usage"' in done.stdout, done
        else:
            assert shlex.split(curl)[:2] == ["curl", f"{address}/v1/{'chat/' if chats else ''}completions"]


@pytest.mark.parametrize(
    "host, address",
    [("127.0.0.1", "http://127.0.0.1:9"), ("0.0.0.0", "http://127.0.0.1:9"), ("::1", "http://[::1]:9"), ("a.org", "http://a.org:9")],
)
def test_addresses(host, address):
    assert address_of(host, 9) == address


def test_a_dry_run_says_what_would_be_served(saved, capsys):
    options = [
        "--adapter",
        saved[1],
        "--max-level",
        "50%",
        "--slots",
        "3",
        "--max-tokens",
        "100",
        "--kv-gib",
        "0.001",
        "--snapshot-gib",
        "0.01",
        "--api-key",
        "secret",
    ]
    assert main(["serve", saved[0], *options, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "my-base: LlamaForCausalLM, 4 layers, torch.float32" in said and "0 to 2 of 4 layers, now 0, by Load" in said
    assert "3 at a time, of 100 tokens at most" in said and "that length at level 0" in said and "that length at level 2" in said
    assert "blocks are shared; 0.010 GiB for snapshots of states, " in said
    assert "API key          asked for" in said and "secret" not in said and "http://127.0.0.1:8000" in said


@pytest.mark.parametrize(
    "policy, changes, words",
    [
        (0, {}, "blocks are shared"),
        (2, {"snapshot_bytes": 0}, "blocks are shared at level 0; above it every prompt is read whole"),
        (2, {"lower_prefixes": True}, "of states, 22 at level 2, also of lower levels"),
        (2, {"prefix_reuse": False}, "every prompt is read whole"),
    ],
)
def test_what_texts_share(tiny_model, adapter_model, policy, changes, words):
    assert prefixes_of(Engine(adapter_model(tiny_model("llama")), policy, options(**changes))).endswith(words)


def test_a_dry_run_refuses_what_serving_would(saved, capsys):
    assert main(["serve", saved[0], "--adapter", saved[1], "--dry-run", "--kv-gib", "0"]) == 1
    assert "kv_bytes" in capsys.readouterr().err


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_a_port_that_is_taken_is_told_before_anything_is_loaded(saved, capsys, dry):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        assert main(["serve", saved[0], "--port", port, *dry]) == 1
    error = capsys.readouterr().err
    assert f"cannot listen on 127.0.0.1, port {port}" in error and "--port" in error and "Loading" not in error
