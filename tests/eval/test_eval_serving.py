"""The evaluation of load-aware levels: search, requests, quality, rows, page, and whole runs at a tiny shape."""

import importlib.util
import json
import math
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from dsla_hf.levels.policies import FixedLevel
from dsla_hf.serving.engine.engine import Engine, EngineOptions
from dsla_hf.serving.replay.trace import PAPER_MIX, TracedRequest, read_trace

EVAL = Path(__file__).resolve().parents[2] / "eval"


@pytest.fixture(scope="module")
def serving():
    """eval/serving.py, imported as the script does; under another name, for there is a tests/support/server.py."""
    before, known = list(sys.path), set(sys.modules)
    sys.path.insert(0, str(EVAL))
    specification = importlib.util.spec_from_file_location("eval_serving", EVAL / "serving.py")
    module = importlib.util.module_from_spec(specification)
    sys.modules["eval_serving"] = module  # dataclasses look there
    specification.loader.exec_module(module)
    yield module
    sys.path[:] = before
    for name in set(sys.modules) - known:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == EVAL:
            del sys.modules[name]


@pytest.fixture(scope="module")
def serving_page(serving):
    return sys.modules["serving_page"]


@pytest.fixture(scope="module")
def trace_file(serving, tmp_path_factory):
    draws, at, requests = random.Random(0), 0.0, []
    for _ in range(200):
        at += draws.expovariate(5)
        requests.append(TracedRequest(at, draws.randint(4, 60), draws.randint(2, 8)))
    path = tmp_path_factory.mktemp("trace") / "trace.csv"
    serving.write_trace(requests, path)
    return path


def arguments(trace_file, results, *more):
    sizes = ["--slots", "4", "--max-tokens", "256", "--chunk", "32", "--kv-gib", "0.01", "--step", "1"]
    return ["--trace", str(trace_file), "--shape", "tiny", "--results", str(results), "--requests", "6", *sizes, *more]


def rows_of(folder):
    return json.loads((folder / "replay.json").read_text())["rows"]


# --- pure functions -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capacity", [0.3, 1.0, 5.3, 17.0])
def test_search_finds_the_highest_rate_in_few_runs(serving, capacity):
    asked = []

    def meets(rate):
        asked.append(rate)
        return rate <= capacity

    found = serving.highest_rate(meets, 2.0, tolerance=0.2, most=9)
    assert found <= capacity < found * 1.21 and len(asked) == len(set(asked)) <= 8
    again, first = [], asked[:]
    asked.clear()
    assert serving.highest_rate(lambda rate: again.append(rate) or rate <= capacity, 2.0, tolerance=0.2, most=9) == found
    assert again == first  # so that an interrupted search finds its rows


def test_search_goes_on_from_what_is_known_and_ends(serving):
    asked = []
    known = {1.0: True, 1.5: True, 2.0: False}
    assert serving.highest_rate(lambda rate: asked.append(rate) or False, 9.0, tolerance=0.2, known=known) == 1.5
    assert asked == [1.73]
    assert serving.highest_rate(lambda rate: False, 2.0, most=3) is None
    assert serving.bracket({1.0: True, 2.0: False, 3.0: True}) == (3.0, None)


def test_part_of_the_trace_has_its_mean_lengths(serving):
    trace = [TracedRequest(float(i), 10 if i < 100 else 505 if i < 200 else 1000, 50) for i in range(300)]
    part = serving.typical_part(trace, 20)
    assert [r.prompt for r in part] == [505] * 20 and [r.at for r in part] == list(range(20))
    assert serving.typical_part(trace, 1000) == trace
    drawn = serving.requests_of(trace, "paper", 100, seed=0)
    assert drawn == serving.requests_of(trace, "paper", 100, seed=0)
    for low, high, share in PAPER_MIX:
        assert abs(sum(low <= r.prompt < high for r in drawn) - 100 * share) <= 1


def test_written_traces_can_be_read(serving, tmp_path):
    requests = [TracedRequest(3.0, 5, 7), TracedRequest(3.25, 8, 1)]
    serving.write_trace(requests, tmp_path / "trace.csv")
    assert read_trace(tmp_path / "trace.csv") == [TracedRequest(0.0, 5, 7), TracedRequest(0.25, 8, 1)]


def test_quality_is_the_yardstick_s_at_the_same_shares_of_layers(serving):
    table = serving.yardstick(EVAL / "results" / "distillation.json")
    assert [share for share, _ in table] == [0, 0.25, 0.5, 0.75, 1] and table[0][1] == 0
    increases = [increase for _, increase in table]
    assert increases == sorted(increases) and 0.05 < increases[-1] < 0.1
    table = [(0.0, 0.0), (0.5, 0.1), (1.0, 0.5)]
    assert serving.quality_cost({"0": 30, "8": 10}, 32, table) == pytest.approx(0.25 * 0.05)
    assert serving.quality_cost({"24": 1, "32": 1}, 32, table) == pytest.approx((0.3 + 0.5) / 2)
    assert serving.quality_cost({}, 32, table) is None


# --- the engine ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def engine(serving):
    options = EngineOptions(slots=2, max_tokens=256, chunk=32, kv_bytes=10**7)
    return Engine(serving.make_model("tiny", torch.device("cpu")), 2, options, eos_tokens=set())


def test_warm_up_leaves_no_trace(serving, engine):
    serving.warm_up(engine, 2, step=1)
    assert not engine.busy and engine.memory.pool.free_blocks == engine.memory.pool.num_blocks
    assert not engine.memory.pool.tables.any()
    serving.begin_anew(engine, FixedLevel(0), 0)
    assert engine.control.level == 0 and engine.stats().seconds_to_first_token is None


def test_hopeless_runs_are_cut(serving, engine):
    serving.begin_anew(engine, FixedLevel(0), 0)
    watch = serving.Watch(engine, slo_first=0.0, late=3, deadline=60.0)
    requests = [TracedRequest(0.01 * i, 10, 50) for i in range(12)]
    with ThreadPoolExecutor(1) as sender:  # nobody steps the engine yet
        future = sender.submit(serving.send_directly, engine, requests, 0, 1.0)
        while len(engine._inbox) < 8:
            assert not future.done(), future.exception()
        engine._open_inbox()
        assert watch.hopeless() == f"{len(engine.scheduler.waiting)} requests without a first token after 0 s"
        assert watch.most_waiting >= 8
        engine.start()
        serving.cut(engine, future)
        engine.stop()
    errors = [request["error"] for request in future.result()["requests"]]
    assert all(errors) and engine.scheduler.max_waiting == 256
    assert serving.Watch(engine, 1.0, None, deadline=-1.0).hopeless().startswith("0 requests not answered")


# --- whole runs ---------------------------------------------------------------------------------------------------------------


def check_row(row, alone, requests):
    assert (row["shape"], row["mix"], row["requests"], row["errors"], row["cut"]) == ("tiny", "plain", requests, 0, None)
    assert row["token_target"] == 2 * alone["per_token"]["p50"] > 0
    for name in ("latency", "first_token", "per_token", "latency_per_token"):
        assert 0 < row[name]["p50"] <= row[name]["p95"] <= row[name]["p99"]
    assert row["generated_tokens_per_second"] > 0 and 0 <= row["slo"]["both"] <= 1
    assert sum(row["tokens_at_level"].values()) == round(row["wanted_tokens"] * requests)
    assert row["level_over_time"][0] == [0.0, 0] and row["share"] in (None, 1.0) and row["seconds"] < 10


def test_rows_over_http(serving, trace_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(serving, "ALONE", 2)
    serving.main(arguments(trace_file, tmp_path, "--mix", "plain", "--rates", "8", "--policies", "fixed"))
    alone, row = rows_of(tmp_path)
    assert (alone["rate"], alone["part"], row["rate"], row["part"]) == (None, "alone", 8, "shares")
    check_row(row, alone, 6)
    assert row["tokens_at_level"].keys() == {"0"} and row["yardstick_perplexity_increase"] == 0
    assert "| tiny | plain | fixed |" in capsys.readouterr().out


def test_rows_without_http_and_how_an_interrupted_run_goes_on(serving, trace_file, tmp_path, monkeypatch):
    options = arguments(trace_file, tmp_path, "--mix", "plain,paper", "--rates", "24", "--direct")
    serving.main(options)
    rows = rows_of(tmp_path)
    assert [(row["mix"], row["policy"], row["rate"]) for row in rows] == [
        (mix, policy, rate) for mix in ("plain", "paper") for policy, rate in (("fixed", None), ("fixed", 24), ("load", 24))
    ]
    check_row(rows[1], rows[0], 6)
    check_row(rows[2], rows[0], 6)
    assert rows[1]["tokens_at_level"].keys() == {"0"} and rows[2]["yardstick_perplexity_increase"] >= 0
    assert "Load(" in rows[2]["control"] and rows[2]["setup"] == rows[1]["setup"]
    assert rows[4]["prompt_tokens"] > 2 * rows[1]["prompt_tokens"]

    stored = json.loads((tmp_path / "replay.json").read_text())
    (tmp_path / "replay.json").write_text(json.dumps({**stored, "rows": [*rows[:2], *rows[3:5]]}))
    measured, measure = [], serving.Measurement.measure
    monkeypatch.setattr(serving.Measurement, "measure", lambda self, run, rate: measured.append(run) or measure(self, run, rate))
    serving.main(options)
    assert [(run.mix, run.policy) for run in measured] == [("plain", "load"), ("paper", "load")]
    kept = rows_of(tmp_path)
    assert [row["latency"] for row in kept[:4]] == [row["latency"] for row in (*rows[:2], *rows[3:5])] and len(kept) == 6
    serving.main([*options, "--requests", "5", "--policies", "fixed", "--mix", "plain"])
    assert len(rows_of(tmp_path)) == 8  # another setup, other rows


def test_one_run_measures_several_temperatures(serving, serving_page, trace_file, tmp_path, monkeypatch):
    """Each has its own requests alone, objective and rows; what is there of one is not measured again for the other."""
    monkeypatch.setattr(serving, "ALONE", 2)
    sent, replayed = [], serving.Measurement.replayed

    def watched(self, requests, speed, watch):
        sent.append(self.temperature)
        return replayed(self, requests, speed, watch)

    monkeypatch.setattr(serving.Measurement, "replayed", watched)
    options = arguments(trace_file, tmp_path, "--mix", "plain", "--rates", "24", "--direct")
    serving.main([*options, "--temperature", "1", "--policies", "fixed"])
    assert [row["setup"]["temperature"] for row in rows_of(tmp_path)] == [1, 1]
    serving.main([*options, "--temperature", "1,0"])
    rows = rows_of(tmp_path)
    found = [(row["setup"]["temperature"], row["policy"], row["rate"]) for row in rows]
    assert found == [(t, *run) for t in (1, 0) for run in (("fixed", None), ("fixed", 24), ("load", 24))]
    assert sent == [1, 1, 1, 1, 0, 0, 0, 0]  # two alone, fixed, load; then all of it
    check_row(rows[2], rows[0], 6)
    check_row(rows[5], rows[3], 6)
    text = serving_page.page_part(rows)
    assert text.count("temperature 1, levels up to 4") == text.count("the likeliest tokens, levels up to 4") == 1


def test_search_then_shares_then_the_other_policy(serving, serving_page, trace_file, tmp_path, monkeypatch):
    """With a fake measurement: level 0 does up to 10 requests a second, the other up to 16."""
    measured = []

    def measure(self, run, rate):
        measured.append((run.policy, rate, run.part))
        met = rate <= (10 if run.policy == "fixed" else 16)
        late = {"mean": 0.1 if met else 4.0, "p50": 0.1, "p95": 0.1, "p99": 0.1}
        cut = None if met or run.part != "search" else "late"
        return {**finished(late, {"0": 10}), "cut": cut, "meets": met}

    monkeypatch.setattr(serving.Measurement, "measure", measure)
    options = arguments(
        trace_file, tmp_path, "--mix", "plain", "--direct", "--first-rate", "4", "--tolerance", "0.1", "--shares", "0.5,1,1.2"
    )
    serving.main(options)
    assert [rate for policy, rate, part in measured if (policy, part) == ("fixed", "search")] == [4, 8, 16, 11.3, 9.51, 10.4]
    assert [(policy, rate) for policy, rate, part in measured if part == "shares" and rate < 12] == [
        ("fixed", 4.75),
        ("load", 4.75),
        ("load", 9.51),  # level 0's is there from the search
        ("fixed", 11.4),
        ("load", 11.4),
    ]
    rows = rows_of(tmp_path)
    assert serving_page.best_rate(rows, "fixed") == 9.51 and 14.5 < serving_page.best_rate(rows, "load") <= 16
    assert measured[-1] == ("fixed", serving_page.best_rate(rows, "load"), "shares")
    assert {row["share"] for row in rows if row["rate"] == 4.75} == {4.75 / 9.51}
    count = len(measured)
    serving.main(options)
    assert len(measured) == count


def finished(latency, tokens):
    times = dict.fromkeys(("latency", "first_token", "per_token", "latency_per_token"), latency)
    return {
        **times,
        "requests": 20,
        "errors": 0,
        "seconds": 10.0,
        "slo": {"both": 1.0},
        "generated_tokens_per_second": 100.0,
        "prompt_tokens": 30.0,
        "wanted_tokens": 5.0,
        "level_over_time": [[0.0, 0], [2.0, 1]],
        "tokens_at_level": tokens,
        "yardstick_perplexity_increase": 0.001,
    }


# --- the page -----------------------------------------------------------------------------------------------------------------


def made_row(serving, policy, rate, mean, met, **values):
    setup = {
        "requests": 20,
        "max_level": 2,
        "slots": 4,
        "chunk": 32,
        "prompt_share": 0.5,
        "kv_bytes": None,
        "device": "CPU",
        "direct": False,
    }
    times = {"mean": mean, "p50": mean, "p95": mean, "p99": mean}
    row = {"shape": "tiny", "mix": "paper", "policy": policy, "rate": rate, "part": "shares", "control": policy, "cut": None, "meets": met}
    return {**row, **finished(times, {"0": 10, "2": 10} if policy == "load" else {"0": 20}), "setup": setup, **values}


def test_page_says_what_pays_and_what_does_not(serving, serving_page, tmp_path):
    pytest.importorskip("matplotlib")
    page = tmp_path / "measured" / "serving.md"
    page.parent.mkdir()
    page.write_text((EVAL.parent / "docs" / "measured" / "serving.md").read_text())
    rows = [
        made_row(serving, "fixed", None, 0.01, None, part="alone"),
        *(made_row(serving, policy, 1.0, mean, True) for policy, mean in (("fixed", 0.1), ("load", 0.105))),
        *(made_row(serving, policy, 2.0, mean, True) for policy, mean in (("fixed", 0.2), ("load", 0.2))),
        *(made_row(serving, policy, 3.0, mean, policy == "load") for policy, mean in (("fixed", 0.93), ("load", 0.4))),
        made_row(serving, "fixed", 4.0, 0.0, False, cut="9 requests not answered after 30 s"),
        made_row(serving, "load", 4.0, 0.9, False),
    ]
    serving_page.write_page(serving_page.with_shares(rows), page)
    text = page.read_text()
    assert "| 3 | 1.50 | load | 20 | 0.4, 0.4 |" in text and "| 4 | 2.00 | fixed | 20 | cut: 9 requests" in text
    assert "3 requests/s with `load`, 2 at level 0 (1.50 ×)" in text
    assert "at most 2.33 × lower, at 3 requests/s (1.50 of level 0's highest), 930 -> 400 ms; the paper's 2.29 × is reached" in text
    assert "latency changes by +5.0%: not within the 3% allowed" in text
    assert "`load` does not pay at 1 requests/s" in text and "Cut, because the queue grew without end: fixed at 4." in text
    assert (tmp_path / "images" / "replay.png").stat().st_size > 1000
    serving_page.write_page([], page)
    assert "Nothing measured yet." in page.read_text() and "replay.png)\n<!-- end -->" not in page.read_text()


def test_the_page_holds_what_the_results_say(serving, serving_page):
    rows = json.loads((EVAL / "results" / "replay.json").read_text())["rows"]
    assert serving_page.page_part(rows) in serving_page.PAGE.read_text(), "`python eval/serving.py --page` would write something else"


def test_rates_without_a_search_are_shares_of_what_another_found(serving, serving_page):
    """Runs beyond what level 0 serves have more requests, and no search of their own."""
    found = made_row(serving, "fixed", 2.0, 0.2, True, part="search")
    setup = found["setup"] | {"requests": 90, "max_level": 1}
    beyond = [made_row(serving, policy, 6.0, mean, False, setup=setup) for policy, mean in (("fixed", 3.0), ("load", 1.0))]
    other = made_row(serving, "fixed", 6.0, 3.0, False, setup=setup | {"chunk": 8})
    rows = serving_page.with_shares([found, *beyond, other])
    assert [row["share"] for row in rows] == [1.0, 3.0, 3.0, None]
    assert serving_page.rates_table(rows).count("paper") == 1
    said = " ".join(serving_page.verdict(beyond))
    assert "at most 3.00 × lower, at 6 requests/s (3.00 of" in said and "lowest rate" not in said


def test_page_without_measurements_and_wrong_options(serving, serving_page, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(serving_page, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(serving_page.write_page, "__defaults__", (tmp_path / "page.md",))
    (tmp_path / "page.md").write_text("before\n<!-- replay -->\nold\n<!-- end -->\nafter\n")
    serving.main(["--page", "--results", str(tmp_path)])
    assert (tmp_path / "page.md").read_text() == "before\n<!-- replay -->\nNothing measured yet.\n<!-- end -->\nafter\n"
    for wrong in (["--mix", "none"], ["--rates", "0"], ["--requests", "1"], ["--temperature", "-1"], ["--temperature", "inf"], []):
        with pytest.raises(SystemExit):
            serving.parse_arguments([*(["--trace", "x"] if wrong else []), *wrong])
    assert "--trace is needed" in capsys.readouterr().err
    assert serving.rounded(math.pi) == 3.14
