"""eval/simulation.py: costs between measured points, a virtual clock that only costs move, forecasts, settings, and the page."""

import json
import random

import pytest
from scripts import EVAL, loaded_with

from dsla_hf.levels.policies import FixedLevel, Load
from dsla_hf.serving.command import ServeOptions, policy_of
from dsla_hf.serving.replay.trace import TracedRequest

LOCAL = ("serving", "serving_page", "reporting", "step_costs")
STEP, TOKEN, FOLD = {0: 0.004, 32: 0.005}, {0: 1e-7, 32: 0.0}, (2e-4, 1e-7)


@pytest.fixture(scope="module")
def script():
    with loaded_with("simulation.py", LOCAL) as module:
        yield module


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Result files of a device that reads 2,048 tokens in 50 ms, 8,192 in 250, and whose steps cost as above and a millisecond more for 64
    rows."""
    folder, growth = tmp_path_factory.mktemp("measured"), []
    for level, base in STEP.items():

        def row(length, batch, prefill, level=level, base=base):
            seconds = base + TOKEN[level] * batch * length + (0.001 if batch == 64 else 0.0)
            case = {"part": "growth", "shape": "llama2-7b", "engine": "graph", "level": level, "length": length, "batch_size": batch}
            return {**case, "seconds_per_token": seconds, "prefill_seconds": prefill}

        growth += [row(2048, 1, 0.09), row(8192, 1, 0.25), row(32768, 1, 2.0), row(2048, 64, 3.2)]
    (folder / "inference.json").write_text(json.dumps({"rows": growth}))
    raises = [
        {"arm": "llama2-7b, graph", "level": level, "length": length, "raise_seconds": level * (FOLD[0] + FOLD[1] * length)}
        for level in (16, 32)
        for length in (2048, 8192)
    ]
    (folder / "raises.json").write_text(json.dumps({"rows": raises}))
    return folder


@pytest.fixture(scope="module")
def costs(script, files):
    return script.StepCosts.read("llama2-7b", files / "inference.json", files / "raises.json")


@pytest.fixture(scope="module")
def simulation(script, costs):
    return script.Simulation("llama2-7b", costs, blocks=32 * 40, max_tokens=4096)


def test_costs_between_what_was_measured(script, files, costs):
    assert costs.decode(0, 1, 1000) == pytest.approx(0.004 + 1e-4)
    assert costs.decode(16, 1, 1000) == pytest.approx(0.0045 + 0.5e-4), "half way between the levels"
    assert costs.decode(32, 64, 10**6) == pytest.approx(0.006) and costs.decode(32, 22, 0) == pytest.approx(0.005 + 0.001 * 21 / 63)
    assert costs.piece(0, 0, 2048) == pytest.approx(0.05), "of many prompts, not of one alone, which waits for the host"
    assert costs.piece(0, 2048, 6144) == pytest.approx(0.2) and costs.piece(0, 0, 1024) == pytest.approx(0.025)
    assert costs.piece(0, 0, 16) == 0.004, "all weights are read"
    assert costs.piece(0, 32768, 24576) == pytest.approx(1.75), "straight on beyond the longest"
    assert costs.pieces(0, [(0, 1024), (2048, 6144)]) == pytest.approx(0.025 + 0.2), "each what its own prompt is longer in"
    assert costs.pieces(0, [(0, 64)] * 2) == 0.004 < 2 * costs.piece(0, 0, 64), "weights are read once"
    together = costs.decode_together([(0, 1, 1000), (32, 3, 5000)], 4)
    assert together == pytest.approx((costs.decode(0, 4, 0) + 3 * costs.decode(32, 4, 0)) / 4 + 1e-4)
    assert together < costs.decode(0, 1, 1000) + costs.decode(32, 4, 5000)
    assert costs.fold(16, 3000) == pytest.approx(16 * (2e-4 + 3e-4))
    with pytest.raises(ValueError, match="no rows of the part growth for llama3-8b"):
        script.StepCosts.read("llama3-8b", files / "inference.json", files / "raises.json")


def test_only_costs_move_the_clock(script, costs, simulation):
    """One text alone: its prompt in two pieces, then its tokens, each step with one token more."""
    settings = script.Settings(chunk=1024, max_level=0)
    (found,), engine = simulation.run([TracedRequest(3.0, 1500, 5)], FixedLevel(0), settings)
    first = costs.piece(0, 0, 1024) + costs.piece(0, 1024, 512)  # 476 tokens are padded to a recorded size
    assert found.sent == 3.0 and found.first_token == pytest.approx(first)
    # The first token of a text is followed by a second in the same step.
    steps = sum(costs.decode(0, 1, 1501 + n) for n in range(4))
    assert found.latency == pytest.approx(first + steps) and found.tokens == 5
    assert engine.memory.pool.free_blocks == engine.memory.pool.num_blocks


def test_levels_follow_the_load_and_folds_cost(script, simulation):
    draws = random.Random(0)
    requests = [TracedRequest(0.02 * n, draws.randint(100, 900), draws.randint(20, 60)) for n in range(60)]
    settings = script.Settings(slots=8, step=16, cool_down=0.1)
    policy = Load(queue_depth=4, waiting_prompt=10**6, cool_down=0.1, step=16, max_level="100%")
    found, engine = simulation.run(requests, policy, settings)
    assert [outcome.tokens for outcome in found] == [request.generated for request in requests]
    changes = [(change.old, change.new) for change in engine.control.changes]
    assert changes[:2] == [(0, 16), (16, 32)] and sum(engine.tokens_at_level) == sum(request.generated for request in requests)
    again, _ = simulation.run(requests, policy, settings)
    assert again == found, "the clock of the wall has no part in it"
    free = script.StepCosts(simulation.costs.steps, simulation.costs.per_token, simulation.costs.reading, (0.0, 0.0))
    quicker, _ = script.Simulation("llama2-7b", free, simulation.blocks, 4096).run(requests, policy, settings)
    assert sum(outcome.latency for outcome in quicker) < sum(outcome.latency for outcome in found)


def test_rows_between_texts_are_counted(script, costs, simulation):
    """Two texts, of which the one in the first slot ends before the other."""
    settings = script.Settings(max_level=0)
    both = [TracedRequest(0.0, 100, tokens) for tokens in (3, 9)]
    shares = [simulation.run(requests, FixedLevel(0), settings)[1].runner.padding_share for requests in (both, both[::-1])]
    longer = sum(costs.decode(0, 2, 101 + n) - costs.decode(0, 1, 101 + n) for n in range(2, 8))
    assert shares[0] * simulation.run(both, FixedLevel(0), settings)[1].runner.decoding == pytest.approx(longer)
    assert shares[1] == 0


@pytest.mark.parametrize("level", [0, 32])
def test_prompts_that_wait_together_share_calls(script, costs, simulation, level):
    """Three prompts that come at once, of 300 tokens in whole rows of 64: one call at level 0, which is padded to a recorded size."""
    requests, found = [TracedRequest(0.0, tokens, 1) for tokens in (100, 60, 70)], {}
    for packing in ("none", "level 0", "any level"):
        outcomes, engine = simulation.run(requests, FixedLevel(level), script.Settings(max_level=level, packing=packing))
        found[packing] = max(outcome.first_token for outcome in outcomes), engine.runner.packed_share
    apart = sum(costs.piece(level, 0, tokens) for tokens in (128, 64, 128))
    together = costs.pieces(level, [(0, 128), (0, 64), (0, 128), (0, 512 - 320)])
    assert found["none"] == (pytest.approx(apart), 0) and found["any level"] == (pytest.approx(together), 1)
    assert found["level 0"] == found["any level" if level == 0 else "none"]


def test_the_price_of_calls_of_several_levels_is_counted(script, costs, simulation):
    requests = [TracedRequest(0.05 * n, 100, 40) for n in range(12)]
    policy, settings = FixedLevel(32), script.Settings(slots=8)
    (_, alike), (_, mixed) = (simulation.run(requests, policy, script.replace(settings, pinned=pinned)) for pinned in (0.0, 1.0))
    assert alike.runner.apart_share == 0, "all texts have the one level of this server"
    assert mixed.runner.apart_share == 0, "also where each says so"
    load = Load(queue_depth=10**6, waiting_prompt=10**6, cool_down=0.1, step=16, max_level="100%")
    shares = [simulation.run(requests, load, script.replace(settings, pinned=pinned))[1].runner.apart_share for pinned in (0.0, 1.0)]
    assert shares[0] == 0 < shares[1] < 1


def measured_run(script, policy, rate, **more):
    times = {"mean": 0.5, "p50": 0.5, "p95": 0.5, "p99": 0.5}
    setup = {"requests": 12, "max_level": 32, "slots": 8, "chunk": 1024, "prompt_share": 0.4}
    row = {"shape": "llama2-7b", "mix": "plain", "policy": policy, "rate": rate, "cut": None, "meets": True, "token_target": 0.02}
    return {**row, "setup": setup, "tokens_at_level": {"0": 3}, "latency": times, "first_token": times, "per_token": times, **more}


def test_forecasts_and_settings_are_kept_and_told(script, files, tmp_path, monkeypatch):
    draws = random.Random(0)
    requests = [TracedRequest(0.1 * n, draws.randint(50, 900), draws.randint(5, 20)) for n in range(60)]
    from serving import write_trace  # eval/serving.py

    write_trace(requests, tmp_path / "trace.csv")
    runs = [measured_run(script, "fixed", 8.0), measured_run(script, "load", 8.0), measured_run(script, "fixed", 16.0, cut="late")]
    (tmp_path / "replay.json").write_text(json.dumps({"rows": [measured_run(script, "fixed", None), *runs]}))
    monkeypatch.setattr(script, "SETTINGS", {"chunk": (512, 2048)})
    monkeypatch.setattr(script, "PAGE", tmp_path / "page.md")
    names = {"inference": files / "inference.json", "raises": files / "raises.json", "replay": tmp_path / "replay.json"}
    options = [*(f"--{name}={path}" for name, path in names.items()), "--trace", str(tmp_path / "trace.csv"), "--results", str(tmp_path)]
    options += ["--choose", "--requests", "12", "--mix", "plain", "--tolerance", "0.5", "--compared-rate", "8"]
    assert script.main(options) == 0
    rows = json.loads((tmp_path / "simulation.json").read_text())["rows"]
    assert [row["policy"] for row in rows if row["part"] == "forecast"] == ["fixed", "load"]
    chosen = [(row["setting"], row["value"]) for row in rows if row["part"] == "choose"]
    assert chosen[:3] == [("as measured", None), ("level 0", None), ("defaults", None)] and chosen[-1] == ("chunk", 512)
    assert all(row["highest_rate"] > 0 and row["latency"]["mean"] > 0 for row in rows if row["part"] == "choose")
    monkeypatch.setattr(script.Simulation, "run", lambda *_: pytest.fail("it is there already"))
    assert script.main(options) == 0
    page = "".join(f"<!-- {name} -->\n<!-- end -->\n" for name in ("costs", "forecast", "settings"))
    (tmp_path / "page.md").write_text(page)
    assert script.main(["--page", "--results", str(tmp_path)]) == 0
    text = (tmp_path / "page.md").read_text()
    assert "| plain | fixed | 8 | 12 |" in text and "| plain | chunk | 512 |" in text and "of 2 runs" in text


def test_the_page_holds_what_the_results_say(script):
    found, text = json.loads((EVAL / "results" / "simulation.json").read_text()), script.PAGE.read_text()
    for name, part in script.page_parts(found).items():
        assert f"<!-- {name} -->\n{part}\n<!-- end -->" in text, "`python eval/simulation.py --page` would write something else"


def test_the_defaults_are_those_of_the_server(script):
    chosen, served = script.DEFAULTS, ServeOptions("model", adapter="adapter")
    assert (chosen.chunk, chosen.prompt_share, chosen.slots) == (served.chunk, served.prompt_share, served.slots)
    targets = {"first_target": chosen.first_target, "token_target": chosen.token_target}
    policy, meant = policy_of(served, 32), script.policy_of("load", chosen, 2.0, 0.01, **targets)
    names = ("queue_depth", "waiting_prompt", "waiting_tokens", "seconds_to_first_token", "seconds_per_token", "cool_down", "step")
    assert [getattr(policy, name) for name in names] == [getattr(meant, name) for name in names]


def test_levels_rise_before_objectives_are_missed(script):
    settings = script.Settings()
    usual = script.policy_of("load", settings, 2.0, 0.01)
    assert usual.seconds_to_first_token == script.FIRST_TARGET * 2.0 < 2.0 and usual.seconds_per_token == script.TOKEN_TARGET * 0.01 < 0.01
    assert (settings.first_target, settings.token_target) == (script.FIRST_TARGET, script.TOKEN_TARGET), "simulated as it was measured"
    blind = script.policy_of("load", settings, 2.0, 0.01, first_target=None, token_target=None)
    assert blind.seconds_to_first_token is None and blind.seconds_per_token is None and blind.queue_depth == settings.queue_depth
    assert script.policy_of("load", settings, 2.0, None).seconds_per_token is None
    assert script.policy_of("fixed", settings, 2.0, 0.01) == FixedLevel(0)


def test_wrong_options(script, capsys):
    for wrong in ([], ["--trace", "x", "--gigabytes", "0"], ["--trace", "x", "--mix", "none"]):
        with pytest.raises(SystemExit):
            script.parse_arguments(wrong)
    assert "--trace is needed" in capsys.readouterr().err
