"""The option batch_invariant: steps of one shape, prompts in pieces of their own, and what it is not for."""

import pytest
from engine_texts import alone, ask, assert_empty, options, prompts, run

from dsla_hf.inference.recorder import PlainRecording
from dsla_hf.serving.command import ServeOptions, load
from dsla_hf.serving.engine.engine import Engine
from dsla_hf.serving.engine.request import Sampling


@pytest.fixture
def tuned(tiny_model, adapter_model):
    return adapter_model(tiny_model("llama"))


def invariant(model, level=2, record=None, **changes):
    return Engine(model, level, options(**{"batch_invariant": True, "max_tokens": 64, **changes}), record=record)


def watched(engine):
    """Shapes of the model's calls: (rows, new tokens, tokens before), and which text's prompt."""
    shapes, call = [], engine.runner._logits_of

    def seen(level, ids, rows, *args):
        shapes.append((*ids.shape, rows.past))
        return call(level, ids, rows, *args)

    engine.runner._logits_of = seen
    return shapes


def test_steps_have_one_shape_whatever_runs(tuned):
    shapes = {}
    for on in (True, False):
        engine = invariant(tuned, batch_invariant=on)
        calls = watched(engine)
        ears = ask(engine, [(prompt, 9) for prompt in prompts(7, 1, 30)])
        run(engine)
        shapes[on] = {shape for shape in calls if shape[1] == 1 and shape[0] > 1}
        assert [ear.tokens for ear in ears] == [alone(tuned, prompt, 9, 2) for prompt in prompts(7, 1, 30)]
        assert_empty(engine)
    assert shapes[True] == {(4, 1, 64)} and len(shapes[False]) > 3


def test_prompts_are_read_in_the_same_pieces_in_any_company(tuned):
    """Of 50 tokens in chunks of 24, beside prompts that leave part of a chunk."""
    pieces = {}
    for on in (True, False):
        for others in ([], [5, 3, 7]):
            engine = invariant(tuned, batch_invariant=on, slots=6, chunk=24)
            read, prefill = {}, engine.runner.prefill

            def noted(request, tokens, read=read, prefill=prefill):
                read.setdefault(request.number, []).append((request.cached, tokens))
                return prefill(request, tokens)

            engine.runner.prefill = noted
            *_, last = ask(engine, [*[([1] * length, 4) for length in others], (list(range(2, 52)), 4)])
            run(engine)
            pieces[on, len(others)] = read[last.request.number]
    assert pieces[True, 0] == pieces[True, 3] == pieces[False, 0] == [(0, 24), (24, 24), (48, 2)]
    assert pieces[False, 3] != pieces[False, 0]


def test_texts_are_folded_one_at_a_time(tuned, monkeypatch):
    level, folds = [0], []
    engine = Engine(tuned, lambda stats: level[0], options(batch_invariant=True, max_tokens=64))
    fold = engine.memory.fold
    monkeypatch.setattr(engine.memory, "fold", lambda slots, *rest: (folds.append(len(slots)), fold(slots, *rest)))
    ask(engine, [([5, 6, 7], 12)] * 4)
    for _ in range(6):
        engine.step()
    level[0] = 3
    run(engine)
    assert folds == [1] * 4


def test_recordings_are_of_all_slots(tuned):
    engine = invariant(tuned, record=PlainRecording)
    engine.prepare([2])
    ask(engine, [([5, 6], 6)])
    run(engine)
    assert {(rows, past) for _, rows, past in engine.runner.recorder.recordings} == {(4, 256)}


def test_log_probabilities_have_the_same_bits(tuned):
    """Also of prompts, and of texts that are drawn."""
    found = []
    for others in (0, 3):
        engine = invariant(tuned)
        events = []
        for number, prompt in enumerate(prompts(others, 5, 20, seed=4)):
            engine.submit(prompt, 12, lambda event: None, Sampling(0.9, seed=number, logprobs=number))
        engine.submit([9, 8, 7, 6, 5] * 4, 12, events.append, Sampling(0.8, seed=3, top_p=0.9, logprobs=2, prompt_logprobs=1))
        run(engine)
        found.append([(event.token, event.logprob, event.prompt_logprobs) for event in events])
    assert found[0] == found[1] and len(found[0]) == 13


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_mixtures_of_experts_are_refused(tiny_model, kind):
    with pytest.raises(ValueError, match=r"batch_invariant is not for mixtures of experts \(num_\w*experts 4\): leave it out"):
        invariant(tiny_model(kind), 0)


def test_the_option_comes_from_the_command(saved):
    engine = load(ServeOptions(*saved, policy="1", batch_invariant=True))[0]
    assert engine.runner.one_shape and engine.next_tokens.at_once == 1
    assert not load(ServeOptions(*saved, policy="1"))[0].runner.one_shape
