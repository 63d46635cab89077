"""eval/against_vllm.py: what is a time of a token, what fits, which rates are tried, and a run in which our server stands in for vLLM."""

import json
import random
import sys
from contextlib import contextmanager

import pytest
from scripts import loaded_with

from dsla_hf.serving.replay.trace import TracedRequest

LOCAL = ("against_vllm_page", "random_server", "server_process", "serving", "serving_page", "reporting")


@pytest.fixture(scope="module")
def script():
    """With eval/ on the path, as the script has it; there is a tests/support/server.py and more of such names."""
    with loaded_with("against_vllm.py", LOCAL) as module:
        yield module


@pytest.fixture(scope="module")
def trace_file(script, tmp_path_factory):
    draws = random.Random(0)
    path = tmp_path_factory.mktemp("trace") / "trace.csv"
    script.write_trace([TracedRequest(0.2 * at, draws.randint(4, 60), draws.randint(9, 16)) for at in range(40)], path)
    return path


def arguments(trace_file, folder, *more):
    sizes = [
        "--slots",
        "4",
        "--max-tokens",
        "256",
        "--chunk",
        "64",
        "--kv-gib",
        "0.02",
        "--requests",
        "4",
        "--tokens",
        "16",
        "--repeats",
        "1",
    ]
    cases = ["--shapes", "small", "--batches", "1,3", "--lengths", "32", "--prefill", "96,8192", "--mix", "plain", "--sampling", "sampled"]
    places = ["--trace", str(trace_file), "--results", str(folder), "--logs", str(folder / "logs")]
    return [*places, *sizes, *cases, "--stand-in", *more]


def stored(folder):
    return json.loads((folder / "against_vllm.json").read_text())["rows"]


# --- pure functions -----------------------------------------------------------------------------------------------------------


def timed(sent, first, step, count, per_piece=1):
    """A request whose tokens come `step` seconds apart, some at a time."""
    times = [(first + step * (n - 1), n) for n in range(per_piece, count + 1, per_piece)]
    return {"sent": sent, "error": None, "token_times": times}


def test_a_token_s_time_is_that_while_all_texts_are_generated(script):
    # The first has tokens of 10 ms while it is alone, of 20 ms from the second's first token on.
    alone = [(0.1 + 0.01 * n, n + 1) for n in range(40)]
    beside = [(0.5 + 0.02 * n, 41 + n) for n in range(20)]
    first = {"sent": 0.0, "error": None, "token_times": [*alone, *beside]}
    second = timed(0.1, 0.4, 0.02, 40)
    seconds, tokens = script.together([first, second])
    assert seconds == pytest.approx(0.02) and tokens == 19
    pieces = script.together([timed(0.0, 0.1, 0.01, 60, per_piece=4)])
    assert pieces[0] == pytest.approx(0.01)
    assert script.together([first, timed(0.9, 0.4, 0.02, 40)]) is None, "the first had ended when the second began"
    assert script.together([first, {**second, "error": "503"}]) is None


def test_what_fits(script):
    config = script.config_of("llama3-8b")
    assert script.token_bytes(config) == 131072 and script.token_bytes(script.config_of("llama2-7b")) == 524288
    assert [script.kept_share(arm, config) for arm in ("vllm", "vllm-fp8", "0", "load")] == [1.0, 0.5, 1.0, 1.0]
    assert script.kept_share("kept:25%", config) == 0.25
    assert [script.kept_share(arm, config) for arm in ("0-fp8", "load-fp8", "kept:25%-fp8")] == [0.5, 0.5, 0.125]
    assert script.weight_bytes("kept:10%-fp8", config) == script.weight_bytes("kept:10%", config)
    assert script.weight_bytes("0-fp8", config) == script.weight_bytes("vllm", config)
    assert 8.0e9 < script.weight_bytes("0", config) / 2 < 8.1e9
    own = script.weight_bytes("kept:10%", config) - script.weight_bytes("vllm", config)
    assert own == 2 * 2 * 32 * 4096 * 4096
    assert script.tokens_wanted(16, 8192, 2048, 128) == 128 + 2 * 64


@pytest.mark.parametrize(
    "arm, policy, narrow", [("0", "0", False), ("0-fp8", "0", True), ("kept:10%-fp8", "kept:10%", True), ("vllm-fp8", "0", True)]
)
def test_arms_in_fp8_are_servers_with_it(script, trace_file, tmp_path, arm, policy, narrow):
    options = script.parse_arguments(arguments(trace_file, tmp_path, "--arms", arm))
    server = script.Server(options, "small", arm, 256, None, script.Budget(None), script.ExitStack())
    asked = sys.modules["random_server"].parse_arguments(server.own_command(8001)[2:])
    assert (asked.policy, asked.kv_cache_dtype) == (policy, "fp8" if narrow else "auto")


def test_runs_of_all_arms_send_the_same_and_no_two_runs_do(script):
    seeds = [script.seed_of(0, "plain", "sampled", rate) for rate in (2.0, 2.8)]
    assert seeds == [script.seed_of(0, "plain", "sampled", rate) for rate in (2.0, 2.8)] and len(set(seeds)) == 2


@pytest.mark.parametrize(
    "wrong, words",
    [
        (["--arms", "vllm,kept:200%"], "kept:200%"),
        (["--grow", "1"], "above 1"),
        (["--shapes", "gpt"], "gpt"),
        (["--requests", "1"], "2 or more"),
        (["--patience", "0"], "--patience must be"),
    ],
)
def test_wrong_options(script, wrong, words, capsys):
    with pytest.raises(SystemExit):
        script.parse_arguments(["--trace", "x", *wrong])
    assert words in capsys.readouterr().err


def test_the_quick_choice_is_small_and_can_be_changed(script):
    options = script.parse_arguments(["--trace", "x", "--quick", "--requests", "20"])
    assert (options.shapes, options.mix, len(options.rates), options.lengths) == (["llama3-8b"], ["paper"], 3, [8192])
    assert options.budget < 300 and options.requests == 20


def test_rates_rise_until_neither_objective_holds(script, trace_file, tmp_path, monkeypatch):
    """With a fake measurement: tokens are in time up to 5 requests a second, first tokens up to 9."""
    options = script.parse_arguments(arguments(trace_file, tmp_path, "--first-rate", "2", "--grow", "1.5", "--tolerance", "0.1"))
    asked = []

    def at_rate(self, key):
        asked.append(key["rate"])
        first, token = key["rate"] <= 9, key["rate"] <= 5
        return {"first_holds": first, "token_holds": token, "meets": first and token, "errors": 0, "reasons": {}}

    monkeypatch.setattr(script.Measurement, "at_rate", at_rate)
    with script.tqdm(disable=True) as bar:
        measurement = script.Measurement(options, "small", "vllm", script.Rows(tmp_path), script.Budget(None), bar)
        measurement.server = script.Server(options, "small", "vllm", 256, None, measurement.budget, script.ExitStack())
        measurement.rates("plain", "sampled")
        assert asked == [2.0, 3.0, 4.5, 6.75, 10.1, 5.51, 4.98, 5.24], "rising, then between 4.5 and 6.75"
        measurement.rates("plain", "sampled")
    assert len(asked) == 8, "what is stored is not measured again"
    assert sys.modules["against_vllm_page"].best_rate(stored(tmp_path)) == 4.98


# --- whole runs ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_both_servers_are_measured_and_a_run_that_ended_goes_on(script, trace_file, tmp_path, monkeypatch, capsys):
    options = arguments(trace_file, tmp_path, "--arms", "kept:50%,vllm", "--rates", "8")
    assert script.main(options) == 0
    rows = stored(tmp_path)
    parts = ["token", "token", "prefill", "prefill", "alone", "rate"]
    assert [(row["arm"], row["part"]) for row in rows] == [(arm, part) for arm in ("vllm", "kept:50%") for part in parts], (
        "the anchor is first"
    )
    target = 2 * rows[4]["per_token"]["p50"]
    for arm in (rows[:6], rows[6:]):
        for row in arm[:2]:
            assert row["seconds_per_token"] > 0 and row["tokens"] >= script.LEAST_TOKENS
        assert arm[1]["tokens_per_second"] == 3 / arm[1]["seconds_per_token"]
        assert 0 < arm[2]["seconds"] < 5 and arm[3]["why"] == "8208 tokens are more than the 4096 positions of the model"
        run = arm[5]
        assert (run["rate"], run["requests"], run["errors"], run["token_target"]) == (8.0, 4, 0, target)
        assert run["meets"] == (run["first_token"]["p95"] <= 2 and run["per_token"]["p95"] <= target)
    assert rows[5]["tokens_at_level"].keys() == {"0"} and rows[11]["tokens_at_level"].keys() == {"2"}
    assert {log.name for log in (tmp_path / "logs").iterdir()} >= {"small-vllm.log", "small-kept-50.log"}
    assert "--policy 0" in (tmp_path / "logs" / "small-vllm.log").read_text()

    started = []

    @contextmanager
    def no_server(command, *_, **__):
        started.append(command)
        raise script.NotServing("there is none")
        yield

    monkeypatch.setattr(script, "server_process", no_server)
    assert script.main(options) == 0 and not started, "everything is there"
    result = json.loads((tmp_path / "against_vllm.json").read_text())
    (tmp_path / "against_vllm.json").write_text(json.dumps({**result, "rows": rows[:-1]}))
    assert script.main([*options, "--budget", "1e-9"]) == 0 and not started
    assert "the budget is spent before: small, kept:50%, rate, plain, sampled, 8.0" in capsys.readouterr().out
    assert script.main(options) == 1 and len(started) == 1 and stored(tmp_path) == rows[:-1]
    assert any("--policy" in word for word in started[0]) and "kept:50%" in started[0]


def test_the_page_is_written_from_rows_alone(script, tmp_path):
    pytest.importorskip("matplotlib")
    page = sys.modules["against_vllm_page"]
    with pytest.raises(ValueError, match="no rows"):
        page.write_page([], tmp_path / "measured" / "page.md")
    setup = {"device": "A GPU", "slots": 4, "stand_in": False, "requests": 9, "slo_first": 2.0}
    empty = dict.fromkeys(("batch", "length", "mix", "sampling", "rate"))
    times = {name: {"mean": 0.5, "p50": 0.5, "p95": 0.5, "p99": 0.5} for name in ("latency", "first_token", "per_token")}

    def row(arm, part, **more):
        return {"shape": "small", "arm": arm, "part": part, "setup": setup, "version": "1.2" if arm == "vllm" else None, **empty, **more}

    def run(arm, rate, meets):
        return row(
            arm, "rate", mix="paper", sampling="greedy", rate=rate, meets=meets, errors=0, token_target=0.01,
            slo={"both": 0.5}, generated_tokens_per_second=7.0, **times,
        )  # fmt: skip

    rows = [
        row("vllm", "token", batch=16, length=64, seconds_per_token=0.010),
        row("0", "token", batch=16, length=64, seconds_per_token=0.011),
        row("vllm", "prefill", length=64, seconds=0.2),
        row("0", "prefill", length=64, why="needs 9 GB for keys and values, there are 8"),
        *(run("vllm", rate, rate < 5) for rate in (2.0, 4.0, 8.0)),
        *(run("0", rate, rate < 3) for rate in (2.0, 4.0)),
    ]
    (tmp_path / "measured").mkdir()
    (tmp_path / "images").mkdir()
    page.write_page(rows, tmp_path / "measured" / "page.md")
    text = (tmp_path / "measured" / "page.md").read_text()
    assert "| 16 | 64 | 10 (1.00) | 11 (1.10) |" in text and "| 64 | 200 (1.00) | needs 9 GB for keys and values, there are 8 |" in text
    assert "| paper | greedy | 10 | 4 (1.00) | 2 (0.50) |" in text and "vLLM 1.2" in text
    assert (tmp_path / "images" / "against_vllm.png").stat().st_size > 1000


def test_a_server_that_does_not_come_up_says_why(script, tmp_path):
    process = sys.modules["server_process"]
    with (
        pytest.raises(script.NotServing, match=r"ended with 3 before it served; the end of it\.log:\n(.|\n)*no such thing"),
        process.server_process(
            [sys.executable, "-c", "print('no such thing'); raise SystemExit(3)"], "http://127.0.0.1:9", tmp_path / "it.log", 60
        ),
    ):
        pass
    with (
        pytest.raises(script.NotServing, match="not ready after 1 s"),
        process.server_process([sys.executable, "-c", "import time; time.sleep(60)"], "http://127.0.0.1:9", tmp_path / "it.log", 1),
    ):
        pass
