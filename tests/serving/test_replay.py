"""`dsla replay`: traces, mixes, and what is measured against a running server."""

import json

import httpx
import pytest
from peft import get_peft_model
from server import byte_tokenizer, served
from transformers import LlamaConfig, LlamaForCausalLM

from dsla_cli import main
from dsla_hf import DSLAConfig
from dsla_hf.serving.engine.engine import Engine, EngineOptions
from dsla_hf.serving.http.api import ApiOptions, build_app
from dsla_hf.serving.replay.client import Outcome, ReplayOptions, replay, summarize, table
from dsla_hf.serving.replay.trace import PAPER_MIX, TracedRequest, drawn_to_mix, read_trace, scaled

TRACE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
    "2023-11-16 18:15:46.6805900,37,4\r\n"
    "2023-11-16 18:15:46.7805900,20,9\r\n"
    "2023-11-16 18:15:47.0805900,88,1\r\n"
    "2023-11-16 18:15:46.9805900,5,12\r\n"
)


@pytest.fixture
def trace_file(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_bytes(TRACE.encode())
    return path


@pytest.fixture(scope="module")
def server():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 97}
    model = get_peft_model(LlamaForCausalLM(LlamaConfig(**sizes)), DSLAConfig(task_type="CAUSAL_LM", window_size=8)).eval()
    engine = Engine(model, 1, EngineOptions(slots=4, max_tokens=512, block_size=8))
    with served(build_app(engine, byte_tokenizer(), ApiOptions("tiny", max_new_tokens=400))) as (server, address):
        yield address


def test_traces_are_read_in_order_of_time(trace_file):
    trace = read_trace(trace_file)
    assert [(round(r.at, 3), r.prompt, r.generated) for r in trace] == [(0, 37, 4), (0.1, 20, 9), (0.3, 5, 12), (0.4, 88, 1)]
    assert len(read_trace(trace_file, 2)) == 2


@pytest.mark.parametrize(
    "content, words",
    [
        ("TIMESTAMP,ContextTokens\n2023-11-16 18:15:46,3\n", "GeneratedTokens"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nnoon,3,4\n", "line 2"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,-3,4\n", "line 2"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,3\n", "line 2"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "no requests"),
        ("", "no column"),
    ],
)
def test_broken_traces_are_refused(tmp_path, content, words):
    (tmp_path / "trace.csv").write_text(content)
    with pytest.raises(ValueError, match=words):
        read_trace(tmp_path / "trace.csv")


def test_rate_and_length_scale(trace_file):
    trace = scaled(read_trace(trace_file), rate=2, length=0.5, max_length=20)
    assert [(round(r.at, 3), r.prompt, r.generated) for r in trace] == [(0, 18, 2), (0.05, 10, 4), (0.15, 2, 6), (0.2, 19, 1)]
    for wrong in ({"rate": 0}, {"length": -1}, {"max_length": 1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            scaled(trace, **wrong)


def test_the_paper_s_mix_is_drawn_bucket_by_bucket():
    trace = [TracedRequest(i / 10, 100 + 41 * i % 4000, i % 50 + 1) for i in range(1000)]
    drawn = drawn_to_mix(trace)
    assert drawn == drawn_to_mix(trace) != drawn_to_mix(trace, seed=1)
    assert [r.at for r in drawn] == [r.at for r in trace]
    for low, high, share in PAPER_MIX:
        inside = [r for r in drawn if low <= r.prompt < high]
        assert abs(len(inside) - 1000 * share) <= 1
        if high <= 4096:  # the trace has such requests
            assert {(r.prompt, r.generated) for r in inside} <= {(r.prompt, r.generated) for r in trace}
    with pytest.raises(ValueError, match="add up"):
        drawn_to_mix(trace, ((1, 10, 0.5),))


def test_the_real_traces(shared_dir):
    trace = read_trace(shared_dir / "data" / "azure" / "AzureLLMInferenceTrace_conv.csv")
    assert len(trace) == 19366 and (trace[0].prompt, trace[0].generated) == (374, 44)
    drawn = drawn_to_mix(trace)
    assert abs(sum(r.prompt >= 8192 for r in drawn) / len(drawn) - 0.0313) < 1e-3


def test_summary():
    outcomes = [Outcome(sent=float(i), prompt=10, wanted=5, tokens=5, first_token=0.1 * i, latency=0.1 * i + 0.4) for i in range(1, 11)]
    outcomes.append(Outcome(sent=11.0, prompt=10, wanted=5, error="500"))
    summary = summarize(outcomes, slo_first=0.55, slo_token=0.2)
    assert summary["errors"] == 1 and summary["slo"] == {"first_token": 5 / 11, "per_token": 10 / 11, "both": 5 / 11}
    assert summary["first_token"] == pytest.approx({"mean": 0.55, "p50": 0.55, "p95": 0.955, "p99": 0.991})
    assert summary["per_token"]["mean"] == pytest.approx(0.1) and summary["seconds"] == pytest.approx(11.4)
    assert "1 errors\n  1 of them: 500\n" in table(summary)
    alone = summarize(outcomes[2:3], 1, 1)["first_token"]
    assert alone == pytest.approx(dict.fromkeys(alone, 0.3)), "of one request every percentile is its own time"
    assert summarize([Outcome(0.0, 1, 1, error="x")], 1, 1)["slo"]["both"] == 0


def test_a_replay_against_a_server(server, trace_file, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["replay", str(trace_file), "--url", server, "--out", str(out), "--vocab", "97", "--rate", "0.5"]) == 0
    result = json.loads((out / "replay.json").read_text())
    assert result["summary"]["errors"] == 0 and [r["tokens"] for r in result["requests"]] == [4, 9, 12, 1]
    assert all(0 < r["first_token"] <= r["latency"] < 10 for r in result["requests"])
    assert result["level_over_time"][0]["level"] == 1 and result["summary"]["slo"]["first_token"] == 1
    assert result["tokens_at_level"] == {"1": 26}
    assert (out / "replay.png").stat().st_size > 1000 and "to first token, ms" in capsys.readouterr().out


@pytest.mark.parametrize("end", ["/v1", "/v1/", "/"])
def test_the_address_may_be_that_of_the_interface(server, trace_file, tmp_path, end):
    assert main(["replay", str(trace_file), "--url", server + end, "--out", str(tmp_path / "out"), "--vocab", "97", "--requests", "1"]) == 0
    result = json.loads((tmp_path / "out" / "replay.json").read_text())
    assert result["summary"]["errors"] == 0 and result["level_over_time"][0]["level"] == 1, "/status is not under /v1"


def test_requests_that_are_refused_are_counted(server, trace_file, tmp_path):
    out = tmp_path / "out"
    assert main(["replay", str(trace_file), "--url", server, "--out", str(out), "--vocab", "97", "--length", "10"]) == 0
    result = json.loads((out / "replay.json").read_text())
    assert result["summary"]["errors"] == 1 and result["requests"][3]["error"].startswith("400: ")


def test_servers_that_do_not_answer_and_wrong_options(trace_file, tmp_path, capsys):
    for url, words in (("http://127.0.0.1:9", "does not answer"), ("localhost:8000", "http://")):
        assert main(["replay", str(trace_file), "--url", url, "--out", str(tmp_path)]) == 1
        assert words in capsys.readouterr().err
    assert main(["replay", str(tmp_path / "none.csv"), "--url", "http://x", "--out", str(tmp_path)]) == 1


def test_tokens_are_drawn_unless_told_otherwise(trace_file, tmp_path, monkeypatch, capsys):
    """At temperature 1, each request with a seed of its own, the same every time."""
    bodies = []

    async def answer(http):
        if http.url.path == "/v1/completions":
            bodies.append(json.loads(http.content))
        return httpx.Response(404, json={})

    client = httpx.AsyncClient
    monkeypatch.setattr(httpx, "AsyncClient", lambda **given: client(transport=httpx.MockTransport(answer), base_url=given["base_url"]))

    def sent(*more):
        bodies.clear()
        assert main(["replay", str(trace_file), "--url", "http://x", "--model", "m", "--out", str(tmp_path), "--rate", "9", *more]) == 0
        return sorted(bodies, key=lambda body: len(body["prompt"]))

    first = sent()
    assert sent() == first and [body["temperature"] for body in first] == [1.0] * 4
    assert len({body["seed"] for body in first}) == 4 and not {"top_p", "top_k"} & set(first[0])
    (shaped, *_) = sent("--temperature", "0.7", "--top-p", "0.9", "--top-k", "40")
    assert (shaped["temperature"], shaped["top_p"], shaped["top_k"]) == (0.7, 0.9, 40)
    greedy = sent("--temperature", "0")
    assert [(body["temperature"], "seed" in body) for body in greedy] == [(0, False)] * 4
    capsys.readouterr()
    assert main(["replay", str(trace_file), "--url", "http://x", "--out", str(tmp_path), "--temperature", "0", "--top-p", "0.9"]) == 1
    assert "leave them out" in capsys.readouterr().err


def test_times_of_tokens_are_noted_and_late_answers_given_up(server, trace_file, tmp_path):
    found = replay(ReplayOptions(str(trace_file), server, str(tmp_path / "out"), vocab=97, token_times=True))
    for request in found["requests"]:
        seconds, tokens = zip(*request["token_times"], strict=True)
        assert list(seconds) == sorted(seconds) and tokens[-1] == request["tokens"] == request["wanted"]
        assert (seconds[0], seconds[-1]) == (request["first_token"], request["latency"])
    late = replay(ReplayOptions(str(trace_file), server, str(tmp_path / "late"), vocab=97, timeout=1e-6))
    assert late["summary"]["errors"] == 4 and late["summary"]["reasons"] == {"not answered within 1e-06 s": 4}
    assert all(request["token_times"] is None for request in late["requests"])
    with pytest.raises(ValueError, match="timeout must be a positive number of seconds, got 0"):
        ReplayOptions(str(trace_file), server, str(tmp_path), timeout=0)
