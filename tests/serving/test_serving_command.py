"""`dsla serve` as a process of its own: checkpoint and adapter in, answers out, and a quiet end at SIGTERM."""

import os
import signal
import socket
import subprocess
import sys
import time

import httpx
import pytest
from head_layers import ORDER
from server import byte_tokenizer

from dsla_cli import main
from dsla_hf import FixedLevel, Load, PromptLength
from dsla_hf.serving.command import ServeOptions, load_app, policy_of
from dsla_hf.serving.engine.engine import EngineOptions
from dsla_hf.serving.http.tools import FORMATS


def test_serve_and_end(saved):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-c", "from dsla_cli import main; raise SystemExit(main())", "serve", saved[0], "--adapter", saved[1]]
    command += ["--policy", "50%", "--port", str(port), "--slots", "2"]
    environment = {**os.environ, "DSLA_API_KEY": "secret", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        address = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 120
        while True:
            try:
                assert httpx.get(f"{address}/health").status_code == 200
                break
            except httpx.TransportError:
                if time.monotonic() > deadline or process.poll() is not None:
                    process.kill()  # else its output has no end
                    pytest.fail(process.communicate()[0])
                time.sleep(0.1)
        body = {"model": "my-base", "prompt": "Hello", "max_tokens": 4}
        assert httpx.post(f"{address}/v1/completions", json=body).status_code == 401
        answer = httpx.post(f"{address}/v1/completions", json=body, headers={"Authorization": "Bearer secret"})
        assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 4
        assert httpx.get(f"{address}/status").json()["level"] == 2
        upgrade = {"Upgrade": "websocket", "Connection": "Upgrade"}  # to what is not there: the request is answered as it is
        for path in ("health", "v1/completions"):
            assert httpx.get(f"{address}/{path}", headers=upgrade, timeout=5).status_code in (200, 401)
        process.send_signal(signal.SIGTERM)
        output = process.communicate(timeout=30)[0]
    finally:
        process.kill()
    # uvicorn ends with the signal that ended it.
    assert process.returncode in (0, -signal.SIGTERM, 128 + signal.SIGTERM), output
    assert "level 0 -> 2: FixedLevel" in output and "secret" not in output and "Traceback" not in output
    assert f"curl {address}/v1/chat/completions" in output and "$DSLA_API_KEY" in output


def test_policies_by_name_and_threshold():
    options = {"model": "m", "adapter": "a"}
    assert policy_of(ServeOptions(**options, policy="8"), 32) == FixedLevel("8")
    assert policy_of(ServeOptions(**options, policy="prompt-length"), 32) == PromptLength()
    policy = policy_of(ServeOptions(**options, queue_depth=3, first_token_target=2.0, cool_down=1.0), 32)
    assert isinstance(policy, Load) and (policy.queue_depth, policy.seconds_to_first_token, policy.cool_down) == (3, 2.0, 1.0)
    assert policy.step == 4 and policy_of(ServeOptions(**options), 4).step == 1 and policy_of(ServeOptions(**options, step=3), 32).step == 3
    with pytest.raises(ValueError, match="queue_depth"):
        policy_of(ServeOptions(**options, policy="8", queue_depth=3), 32)


def test_options_reach_the_engine(saved):
    app = load_app(ServeOptions(saved[0], saved[1], max_level="50%", slots=3, kv_gib=0.001, chunk=32))
    engine = app.state.engine
    assert engine.control.highest == 2 and engine.options.slots == 3 and engine.chunk == 32
    assert engine.memory.pool.num_blocks == 2**30 // 1000 // (2 * EngineOptions.block_size * 2 * 8 * 4)


def test_drafts_reach_the_engine(saved):
    by_level = load_app(ServeOptions(saved[0], saved[1], policy="1", draft_level="100%", draft_tokens=3, draft_rows=2)).state.engine.drafts
    assert by_level.level == 4 and by_level.lengths.longest == 3 and by_level.rows == 2
    by_lookup = load_app(ServeOptions(saved[0], draft_lookup=True)).state.engine.drafts
    assert by_lookup.level is None and by_lookup.lengths.longest > 3 and by_lookup.rows == 4
    assert load_app(ServeOptions(saved[0])).state.engine.drafts is None


@pytest.mark.parametrize("level, expected, step", [("kept:50%", 4, 1), ("75%", 6, 2)])
def test_levels_in_heads_reach_the_engine(tmp_path, tiny_model, adapter_model, level, expected, step):
    base = tiny_model("llama")
    base.save_pretrained(tmp_path / "my-base")
    byte_tokenizer().save_pretrained(tmp_path / "my-base")
    adapter_model(base, conversion_unit="head", conversion_order=ORDER).save_pretrained(tmp_path / "my-adapter")
    options = ServeOptions(str(tmp_path / "my-base"), str(tmp_path / "my-adapter"), max_level=level, step="25%" if step == 2 else None)
    engine = load_app(options).state.engine
    assert engine.control.highest == expected == engine.levels.ladder[-1] and engine.levels.unit == "head"
    assert engine.control.policy.rungs(engine.stats()) == step, "an eighth of eight heads, or what was asked for"


@pytest.mark.parametrize(
    "options, words",
    [
        (["--policy", "clever"], "level_policy"),
        (["--step", "0"], "step must be"),
        (["--max-level", "kept:1"], "whole layers"),
        (["--max-level", "9"], "9"),
        (["--max-tokens", "99999"], "max_tokens 99999"),
        (["--kv-gib", "0"], "kv_bytes"),
        (["--api-key", " "], "api key"),
        (["--prompt-share", "0"], "prompt_share"),
        (["--snapshot-gib", "1e-6"], "snapshot_bytes 1073 hold no snapshot, which takes"),
        (["--snapshot-gib", "1e9"], "are more than the"),
        (["--snapshot-gib", "1", "--no-prefix-reuse"], "is for prefix_reuse, which is off here"),
        (["--lower-prefixes", "--batch-invariant"], "lower_prefixes True is for prefix_reuse"),
        (["--policy", "3", "--draft-level", "50%"], "draft_level 2 is not above level 3"),
        (["--draft-level", "9"], "9"),
        (["--draft-tokens", "3"], "nothing drafts"),
        (["--draft-lookup", "--batch-invariant"], "batch_invariant"),
    ],
)
def test_wrong_options_say_what(saved, capsys, options, words):
    assert main(["serve", saved[0], "--adapter", saved[1], *options]) == 1
    *_, error = capsys.readouterr().err.splitlines()  # after the bar of loading, if it came so far
    assert error.startswith("dsla serve: ") and words in error


def test_a_draft_level_needs_an_adapter(saved, capsys):
    assert main(["serve", saved[0], "--draft-level", "2"]) == 1
    assert "--draft-level needs --adapter" in capsys.readouterr().err


def test_formats_of_tools_are_those_of_the_command(capsys):
    """The command line names them without importing what reads them."""
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    assert f"--tool-format {{auto,none,{','.join(FORMATS)}}}" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    "options, words",
    [
        (["--port", "99999"], "give a --port up to 65535"),
        (["--api-key", ""], "the api key is empty"),
        (["--api-key", " "], "the api key is empty"),
    ],
)
def test_options_that_would_serve_something_else_are_refused(saved, options, words, capsys, monkeypatch):
    monkeypatch.delenv("DSLA_API_KEY", raising=False)
    assert main(["serve", saved[0], "--adapter", saved[1], "--dry-run", *options]) != 0
    assert words in capsys.readouterr().err


def test_an_empty_key_of_the_environment_is_refused(saved, capsys, monkeypatch):
    monkeypatch.setenv("DSLA_API_KEY", "")
    assert main(["serve", saved[0], "--adapter", saved[1], "--dry-run"]) != 0
    assert "the api key is empty" in capsys.readouterr().err
