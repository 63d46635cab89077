"""Drafts in the server: every text is what it is without them, at any level, in any company, and nothing leaks."""

from unittest.mock import patch

import openai
import pytest
import torch
from engine_texts import SMALL, Ear, alone, ask, assert_empty, options, prompts, run
from prometheus_client import generate_latest
from server import byte_tokenizer, served

from dsla_hf import Load
from dsla_hf.inference.recorder import CudaRecording, PlainRecording
from dsla_hf.inference.sampling import Sampling
from dsla_hf.levels.draft_length import FixedLength
from dsla_hf.serving.engine.engine import Engine, EngineOptions
from dsla_hf.serving.http.api import ApiOptions, build_app
from dsla_hf.serving.http.metrics import Metrics

HEADS = {"conversion_unit": "head", "conversion_order": [[1, 0], [3, 1], [0, 1], [3, 0], [2, 0], [1, 1], [2, 1], [0, 0]]}
UNITS = {"layers": {}, "heads": HEADS, "pure": {"window_size": 0}, "window": HEADS | {"states": False}}
DAILY = [unit if unit in ("heads", "pure") else pytest.param(unit, marks=pytest.mark.slow) for unit in UNITS]
LONG = {"draft_level": 4, "draft_tokens": 3}


@pytest.fixture
def tuned(tiny_model, adapter_model):
    return adapter_model(tiny_model("llama"))


def texts(engine, wanted, *samplings):
    ears = []
    for number, (prompt, tokens) in enumerate(wanted):
        ear = Ear()
        ear.request = engine.submit(prompt, tokens, ear, samplings[number % len(samplings)] if samplings else None)
        ears.append(ear)
    run(engine)
    return ears


class AnyLength(FixedLength):
    """The server guesses up to the end of a text, also by fewer tokens than elsewhere."""

    def __init__(self, tokens):
        super().__init__(tokens)
        self.lengths = list(range(1, tokens + 1))


@patch("dsla_hf.levels.drafting.lengths_for", AnyLength)
def of_generate(model, wanted, level, draft, tokens):
    """What `generate` with drafts gives for each text, and how many tokens are guessed and right in all."""
    model.set_level(level)
    found = [
        model.generate(
            torch.tensor([prompt]),
            max_new_tokens=most,
            do_sample=False,
            draft_level=draft,
            draft_tokens=tokens,
            return_dict_in_generate=True,
        )
        for prompt, most in wanted
    ]
    new = [out.sequences[0, len(prompt) :].tolist() for out, (prompt, _) in zip(found, wanted, strict=True)]
    return new, sum(out.drafted for out in found), sum(out.accepted for out in found)


@pytest.mark.parametrize("unit", DAILY)
@pytest.mark.parametrize("record", [pytest.param(None, marks=pytest.mark.slow), PlainRecording])
def test_greedy_texts_and_guesses_are_those_of_generate_alone(tiny_model, adapter_model, unit, record):
    """That as many guesses are right says that drafts know the same text."""
    model = adapter_model(tiny_model("llama"), **UNITS[unit])
    most, right = model.level_sizes()["max_level"], 0
    wanted = [(prompt, 12 + 7 * i) for i, prompt in enumerate(prompts(4))]
    for level, draft in ((0, 1), (0, most), (2, 3), (most - 1, most)):
        engine = Engine(model, level, options(draft_level=draft, draft_tokens=3), record=record)
        ears = texts(engine, wanted)
        expected = of_generate(model, wanted, level, draft, 3)
        assert ([ear.tokens for ear in ears], engine.drafts.drafted, engine.drafts.accepted) == expected, (level, draft)
        assert expected[0] == [alone(model, prompt, tokens, level) for prompt, tokens in wanted]
        right += engine.drafts.accepted
        assert_empty(engine)
    assert right > 0


@pytest.mark.parametrize("unit", DAILY)
def test_drafts_that_are_longer_than_the_window(tiny_model, adapter_model, unit):
    """Places of a window of which several guesses would take the same one."""
    model = adapter_model(tiny_model("llama"), **{"window_size": 4, "sink_tokens": 2} | UNITS[unit])
    wanted, right = [(prompt, 25) for prompt in prompts(3)], 0
    for level, draft in ((0, 2), (1, 3), (3, 4)):
        engine = Engine(model, level, options(draft_level=draft, draft_tokens=6))
        ears = texts(engine, wanted)
        assert [ear.tokens for ear in ears] == [alone(model, prompt, tokens, level) for prompt, tokens in wanted]
        assert (engine.drafts.drafted, engine.drafts.accepted) == of_generate(model, wanted, level, draft, 6)[1:]
        right += engine.drafts.accepted
    assert right > 0


@pytest.mark.parametrize("unit", ["layers", "heads"])
def test_recorded_steps_look_at_no_value(tiny_model, adapter_model, unit, watched_recording):
    model = adapter_model(tiny_model("llama"), **UNITS[unit])
    engine = Engine(model, 1, options(draft_level=3, draft_tokens=2), record=watched_recording)
    engine.prepare()
    kinds = {key[0] for runner in (engine.runner, *engine.drafts.runners) for key in runner.recorder.recordings}
    assert {1, "guess", "check"} <= kinds
    wanted = [(prompt, 20) for prompt in prompts(2)]
    assert [ear.tokens for ear in texts(engine, wanted)] == [alone(model, prompt, tokens, 1) for prompt, tokens in wanted]
    for runner, kind in ((engine.runner, "keep"), (engine.drafts.guesses.runner, "follow")):
        assert kind in {key[0] for key in runner.recorder.recordings}
        assert runner.recorder.reason is None


@pytest.mark.parametrize("unit", [pytest.param("layers", marks=pytest.mark.slow), "heads"])
def test_kernels_read_drafts_and_checks_in_blocks(tiny_model, adapter_model, unit, interpreted_kernels, monkeypatch):
    order = [[1, 0], [0, 1], [1, 1]] if unit == "heads" else [1, 0]
    model = adapter_model(tiny_model("llama", num_hidden_layers=2), **UNITS[unit] | {"conversion_order": order})
    engine = Engine(model, 1, options(draft_level=len(order), draft_tokens=2, draft_rows=2), record=PlainRecording)
    wanted = [([5, 6, 7, 8], 7), ([9, 3, 4], 5)]
    ears = texts(engine, wanted)
    assert engine.runner.in_blocks and engine.drafts.rounds > 2
    monkeypatch.setattr("dsla_kernels.dispatch.choice", "auto")
    expected = of_generate(model, wanted, 1, len(order), 2)
    assert ([ear.tokens for ear in ears], engine.drafts.drafted, engine.drafts.accepted) == expected
    assert_empty(engine)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("drafts", [{"draft_level": 4}, {"draft_lookup": True}], ids=str)
@pytest.mark.parametrize("unit", ["layers", "heads"])
def test_captured_drafts(tiny_model, adapter_model, unit, drafts):
    model = adapter_model(tiny_model("llama", hidden_size=64, head_dim=16), **UNITS[unit]).cuda()
    wanted = [(prompt * 2, 40) for prompt in prompts(3)]
    found = []
    for changes in ({}, drafts):
        engine = Engine(model, 1, options(**changes), record=CudaRecording)
        engine.prepare()
        found.append([ear.tokens for ear in texts(engine, wanted)])
    assert found[0] == found[1] and engine.drafts.rounds > 0
    assert all(runner.recorder.reason is None for runner in (engine.runner, *engine.drafts.runners))


@pytest.mark.parametrize("kind", ["gemma3_text", "phi3", "gpt_oss", "cohere2", "mixtral"])
def test_other_architectures(tiny_model, adapter_model, kind):
    model = adapter_model(tiny_model(kind))
    wanted = [(prompt, 20) for prompt in prompts(3, longest=30)]
    engine = Engine(model, 1, options(draft_level=4, draft_tokens=4))
    ears = texts(engine, wanted)
    assert [ear.tokens for ear in ears] == [alone(model, prompt, tokens, 1) for prompt, tokens in wanted]
    assert engine.drafts.drafted > 0


def asked_of_tokens(end):
    """Ways to choose tokens, one text each."""
    return [
        Sampling(temperature=0.8, top_p=0.9, seed=5),
        Sampling(temperature=0.7, top_k=20, seed=6, repetition_penalty=1.3, logprobs=2),
        Sampling(frequency_penalty=0.5, presence_penalty=0.2, logit_bias=((9, 3.0),)),
        Sampling(min_tokens=9, stop_token_ids=(end,)),
    ]


def events_of(engine, wanted, samplings):
    heard = []
    for (prompt, tokens), sampling in zip(wanted, samplings, strict=True):
        heard.append([])
        engine.submit(prompt, tokens, heard[-1].append, sampling)
    run(engine)
    return [[(event.token, event.finish, event.logprob and event.logprob.token) for event in events] for events in heard]


@pytest.mark.parametrize("drafts", [{"draft_level": 4}, {"draft_lookup": True}], ids=str)
@pytest.mark.parametrize("level", [0, 2])
def test_whatever_is_asked_of_tokens_the_text_is_that_without_drafts(tuned, drafts, level):
    """Draws hang on seed and place alone, and all else on the tokens before."""
    wanted = [(prompt * 3, 30) for prompt in prompts(4, 4, 6, seed=3)]
    end = alone(tuned, wanted[3][0], 12, level)[-1]
    plain = events_of(Engine(tuned, level, SMALL), wanted, asked_of_tokens(end))
    engine = Engine(tuned, level, options(**drafts, draft_tokens=3))
    assert events_of(engine, wanted, asked_of_tokens(end)) == plain
    assert 0 < engine.drafts.accepted < engine.drafts.drafted
    assert len({len(events) for events in plain}) > 1  # one ends early
    alone_again = Engine(tuned, level, options(**drafts, draft_tokens=2))
    assert events_of(alone_again, wanted[:1], asked_of_tokens(end)[:1]) == plain[:1]


def test_a_constraint_is_followed(tuned):
    class Even:
        """Even tokens, then tokens that are multiples of four."""

        def __init__(self):
            self.tokens = []

        def mask(self):
            step = 4 if len(self.tokens) % 2 else 2
            words = torch.zeros(4, dtype=torch.int64)
            for token in range(0, 97, step):
                words[token // 32] |= 1 << token % 32
            return torch.where(words >= 2**31, words - 2**32, words).int()

        def accept(self, token):
            self.tokens.append(token)

    found = []
    for changes in ({}, {"draft_level": 4, "draft_tokens": 3}, {"draft_lookup": True, "draft_tokens": 2}):
        engine, ear, constraint = Engine(tuned, 0, options(**changes)), Ear(), Even()
        engine.submit([5, 6, 7, 5, 6], 25, ear, constraint=constraint)
        run(engine)
        assert constraint.tokens == ear.tokens
        found.append(ear.tokens)
    assert found[0] == found[1] == found[2] and all(token % 2 == 0 for token in found[0])


def test_drafts_only_while_few_texts_run_and_none_waits(tuned):
    engine = Engine(tuned, 0, options(**LONG, draft_rows=2))
    wanted = [(prompt, 12) for prompt in prompts(6, 4, 8)]
    ears = ask(engine, wanted)
    while len(engine.scheduler.running) > 2 or engine.scheduler.waiting or not engine.read_tokens:
        engine.step()
        if len(engine.scheduler.running) > 2:
            assert engine.drafts.rounds == 0
    late = ask(engine, [(prompts(1, 9, 9, seed=4)[0], 40)])
    run(engine)
    assert engine.drafts.rounds > 3
    for (prompt, tokens), ear in zip([*wanted, (late[0].request.prompt, 40)], [*ears, *late], strict=True):
        assert ear.tokens == alone(tuned, prompt, tokens, 0)
    assert_empty(engine)


def test_drafts_come_back_after_a_pause(tuned):
    """The draft folds what was said meanwhile, in pieces or anew."""
    (first, second) = prompts(2, 6, 6)
    for pause in (5, 20):
        engine = Engine(tuned, 1, options(**LONG, draft_rows=1))
        early = ask(engine, [(first, 60)])[0]
        while len(early.tokens) < 10:
            engine.step()
        before = engine.drafts.rounds
        ask(engine, [(second, pause)])
        engine.step()
        while len(engine.scheduler.running) > 1:
            engine.step()
        assert engine.drafts.rounds == before > 0
        run(engine)
        assert early.tokens == alone(tuned, first, 60, 1) and engine.drafts.rounds > before


def test_catching_up_in_pieces_and_anew_give_the_same_guesses(tuned, monkeypatch):
    found = []
    for piece, pieces in ((256, 16), (4, 16), (4, 1)):
        monkeypatch.setattr("dsla_hf.serving.engine.guesses.CATCH_UP", piece)
        monkeypatch.setattr("dsla_hf.serving.engine.guesses.PIECES", pieces)
        engine = Engine(tuned, 1, options(draft_level=3, draft_tokens=2))
        ear = ask(engine, [(prompts(1, 20, 20)[0], 60)])[0]
        lengths, turn = engine.drafts.lengths, iter(range(1000))
        monkeypatch.setattr(lengths, "next", lambda turn=turn: 2 if next(turn) % 20 < 8 else 0)
        run(engine)
        found.append((ear.tokens, engine.drafts.drafted, engine.drafts.accepted))
    assert found[0] == found[1] == found[2] and found[0][2] > 0


def test_levels_that_change_under_drafts(tuned):
    """A raise folds; at the draft's own level there are none."""
    level = [0]
    engine = Engine(tuned, lambda stats: level[0], options(draft_level=3, draft_tokens=3))
    prompt = prompts(1, 15, 15)[0]
    ear = ask(engine, [(prompt, 40)])[0]
    for after, to in ((8, 1), (16, 2), (26, 3)):
        while len(ear.tokens) < after:
            engine.step()
        level[0] = to
    engine.step()
    rounds = engine.drafts.rounds
    run(engine)
    assert engine.drafts.rounds == rounds > 4
    expected, cache = torch.tensor([prompt]), None
    for (_, to), end in zip(ear.request.levels, [*[tokens for tokens, _ in ear.request.levels[1:]], 55], strict=True):
        tuned.set_level(to)
        out = tuned.generate(
            expected, past_key_values=cache, max_new_tokens=end - expected.shape[1], do_sample=False, return_dict_in_generate=True
        )
        expected, cache = out.sequences, out.past_key_values
    assert ear.tokens == expected[0, 15:].tolist()
    assert_empty(engine)


def test_texts_of_several_levels_at_a_time(tuned):
    engine = Engine(tuned, Load(max_level=3), options(draft_level=3, draft_tokens=2))
    wanted = [(prompt, 20, level) for prompt, level in zip(prompts(4, 5, 9), (0, 2, 3, None), strict=True)]
    ears = []
    for prompt, tokens, level in wanted:
        ear = Ear()
        engine.submit(prompt, tokens, ear, level=level)
        ears.append(ear)
    run(engine)
    assert [ear.tokens for ear in ears] == [alone(tuned, prompt, tokens, level or 0) for prompt, tokens, level in wanted]
    assert engine.drafts.accepted > 0


def test_a_shared_beginning_stays_as_it_is(tuned):
    """Guesses are never written into blocks that others read."""
    prefix = prompts(1, 24, 24)[0]
    wanted = [(prefix + tail, 20) for tail in prompts(4, 1, 5, seed=2)]
    engine = Engine(tuned, 0, options(**LONG))
    first = texts(engine, wanted[:1])
    ears = first + texts(engine, wanted[1:])
    assert engine.prefix_hits > 0 and engine.drafts.rounds > 0
    assert [ear.tokens for ear in ears] == [alone(tuned, prompt, tokens, 0) for prompt, tokens in wanted]
    chat = wanted[0][0] + first[0].tokens + [9, 8]
    again = texts(engine, [(chat, 10)])[0]
    assert again.request.reused >= len(wanted[0][0]) and again.tokens == alone(tuned, chat, 10, 0)
    assert_empty(engine)


def test_ends_cancels_and_failures_leave_nothing_behind(tuned, monkeypatch):
    engine = Engine(tuned, 1, options(**LONG))
    prompt = prompts(1, 9, 9)[0]
    whole = alone(tuned, prompt, 30, 1)
    stops = Ear()
    engine.submit(prompt, 30, stops, Sampling(stop_token_ids=(whole[11],)))
    run(engine)
    assert stops.finish == "stop" and stops.tokens == whole[: whole.index(whole[11])]
    ear = ask(engine, [(prompt, 30)])[0]
    while len(ear.tokens) < 6:
        engine.step()
    engine.cancel(ear.request)
    run(engine)
    assert ear.finish == "cancelled"
    assert_empty(engine)
    ear = ask(engine, [(prompt, 30)])[0]
    while len(ear.tokens) < 6:
        engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(engine.drafts.checks, "read", lambda *_: 1 / 0)
        engine.step()
    run(engine)
    assert isinstance(ear.error, ZeroDivisionError)
    out_of_memory = ask(engine, [(prompt, 30), (prompt, 30)])
    while len(out_of_memory[1].tokens) < 6:
        engine.step()

    def fails(*_):
        raise torch.OutOfMemoryError("none left")

    with monkeypatch.context() as patch:
        patch.setattr(engine.drafts.checks, "keep", fails)
        engine.step()
    run(engine)
    assert out_of_memory[1].error is not None and out_of_memory[0].tokens == whole  # the other one is read again
    assert_empty(engine)


def test_at_its_end_a_text_is_whole_in_its_states(tuned, monkeypatch):
    """Others may go on from them. In the middle of a draft, too."""
    prompt, held = prompts(1, 9, 9)[0], []
    for changes in ({}, LONG):
        engine = Engine(tuned, 2, options(**changes))
        release = engine.memory.release

        def look(slot, engine=engine, release=release):
            held.append([x[slot].clone() for _, _, states in engine.memory.states(2) for x in states.all_slots])
            release(slot)

        monkeypatch.setattr(engine.memory, "release", look)
        ask(engine, [(prompt, 23), (prompt[2:], 30)])
        run(engine)
    for plain, drafted in zip(held[:2], held[2:], strict=True):
        torch.testing.assert_close(drafted, plain, atol=1e-4, rtol=1e-4)


def test_drafts_without_memory_end_and_texts_go_on(tuned, monkeypatch, caplog):
    engine = Engine(tuned, 1, options(**LONG))
    wanted = [(prompt, 20) for prompt in prompts(2)]

    def fails(*_):
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(engine.drafts.guesses.memory, "begin", fails)
    ears = texts(engine, wanted)
    assert [ear.tokens for ear in ears] == [alone(tuned, prompt, tokens, 1) for prompt, tokens in wanted]
    assert engine.drafts.rounds == 0 and [record.message for record in caplog.records if "drafts" in record.message] == [
        "memory does not suffice for drafts: from now on there are none; for more memory give less to keys and values (kv_bytes, --kv-gib)"
    ]


def test_lookup_finds_what_was_said_before(tuned):
    prompt = [5, 6, 7, 8, 9, 10] * 4
    engine = Engine(tuned, 0, options(draft_lookup=True, draft_tokens=4))
    ear = texts(engine, [(prompt, 40)])[0]
    assert ear.tokens == alone(tuned, prompt, 40, 0) and engine.drafts.drafted > 0
    guesses = engine.drafts.guesses
    request = ask(engine, [(prompt, 5)])[0].request
    assert guesses.guess(0, [request], [4]) == [[5, 6, 7, 8]]
    request.tokens = [5, 6, 50]
    assert guesses.guess(0, [request], [4]) == [[]]
    request.tokens = [5, 6, 50, 20, 5, 6]
    assert guesses.guess(0, [request], [2]) == [[50, 20]]


@pytest.mark.parametrize("guess_seconds, pays", [(0.01, True), (0.9, False)])
def test_drafts_end_where_they_do_not_pay(tuned, guess_seconds, pays):
    """A token of the text takes a second, and so does a check."""
    now = [0.0]
    engine = Engine(tuned, 2, options(draft_level=3), clock=lambda: now[0])

    def takes(seconds, function):
        def run(*arguments):
            now[0] += seconds
            return function(*arguments)

        return run

    drafts = engine.drafts
    engine.runner.decode, drafts.checks.read = takes(1.0, engine.runner.decode), takes(1.0, drafts.checks.read)
    drafts.guesses.step = takes(guess_seconds, drafts.guesses.step)
    ear = ask(engine, [(prompts(1, 6, 6)[0], 100)])[0]
    run(engine)
    assert ear.tokens == alone(tuned, ear.request.prompt, 100, 2)
    assert (drafts.rounds > 20 and now[0] < 90) if pays else (drafts.rounds <= 6 and now[0] > 95)


def test_metrics_count_drafts(tuned):
    engine = Engine(tuned, 0, options(**LONG))
    texts(engine, [(prompt, 12) for prompt in prompts(3)])
    page = generate_latest(Metrics(engine, "m").registry).decode()
    drafts = engine.drafts
    for name, value in (("drafts", drafts.rounds), ("draft_tokens", drafts.drafted), ("accepted_tokens", drafts.accepted)):
        assert f'vllm:spec_decode_num_{name}_total{{model_name="m"}} {float(value)}' in page and value > 0
    assert engine.snapshot()["drafts"] == {"rounds": drafts.rounds, "drafted": drafts.drafted, "accepted": drafts.accepted}
    without = Engine(tuned, 0, SMALL)
    assert without.snapshot()["drafts"] is None and "spec_decode" not in generate_latest(Metrics(without, "m").registry).decode()


def test_what_cannot_be_drafted_is_refused(tuned, tiny_model):
    for level, draft, words in [
        (2, 2, "not above level 2"),
        (3, 1, "not above level 3"),
        ("load", 0, "not above level 0"),
        (0, 9, "levels go from"),
    ]:
        with pytest.raises(ValueError, match=words):
            Engine(tuned, level, options(draft_level=draft))
    with pytest.raises(ValueError, match="this model has level 0 and no other"):
        Engine(tiny_model("llama"), 0, options(draft_level=1))
    for wrong, words in [
        ({"draft_level": 2, "draft_lookup": True}, "one thing drafts"),
        ({"draft_tokens": 2}, "nothing drafts"),
        ({"draft_lookup": True, "draft_tokens": 0}, "draft_tokens must be 1 or more"),
        ({"draft_level": 2, "batch_invariant": True}, "not for batch_invariant"),
    ]:
        with pytest.raises(ValueError, match=words):
            EngineOptions(**wrong)


def test_answers_over_http_are_those_without_drafts(tuned):
    """With a stop string, which is found in the middle of a draft; whole and streamed."""
    answers = []
    for changes in ({}, LONG, {"draft_lookup": True, "draft_tokens": 4}):
        engine = Engine(tuned, 0, options(**changes))
        with served(build_app(engine, byte_tokenizer(), ApiOptions("tiny"))) as (_, address):
            client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)

            def complete(client=client, **asked):
                return client.completions.create(model="tiny", prompt="abcabcab", seed=3, max_tokens=30, **asked)

            whole = complete(temperature=0.0)
            stop = whole.choices[0].text[12:14]
            ended = complete(temperature=0.0, stop=stop)
            drawn = complete(temperature=0.9, n=2, logprobs=1)
            pieces = "".join(piece.choices[0].text for piece in complete(temperature=0.0, stop=stop, stream=True))
        assert ended.choices[0].text == pieces == whole.choices[0].text.split(stop)[0] and ended.choices[0].finish_reason == "stop"
        said = [(choice.text, choice.finish_reason) for one in (whole, ended, drawn) for choice in one.choices]
        answers.append((said, [one.usage.completion_tokens for one in (whole, ended, drawn)], drawn.choices[1].logprobs.tokens))
        assert bool(changes) == (engine.drafts is not None and engine.drafts.rounds > 0)
    assert answers[0] == answers[1] == answers[2]


def test_a_text_that_is_whole_ends_though_memory_does_not_suffice_for_its_states(tuned):
    """What is kept of it for others is lost, and no token comes behind its last."""
    engine = Engine(tuned, 2, options(**LONG))
    wanted = [(prompt, tokens) for prompt, tokens in zip(prompts(2, 9, 9), (9, 40), strict=True)]
    keep, failed = engine.drafts.checks.keep, []

    def failing(counts):
        if not failed and ears[0].request.tokens and len(ears[0].request.tokens) == 9:
            failed.append(counts)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return keep(counts)

    engine.drafts.checks.keep = failing
    ears = ask(engine, wanted)
    run(engine)
    assert failed and [ear.finish for ear in ears] == ["length", "length"]
    assert [ear.tokens for ear in ears] == [alone(tuned, prompt, tokens, 2) for prompt, tokens in wanted]
    assert_empty(engine)


@pytest.mark.parametrize("draft_level", [1, 4])
def test_guesses_behind_the_longest_text_are_written_nowhere(tuned, draft_level):
    """There is no block for them: at the end of a text of all the tokens that one may have they would go over earlier ones."""
    said = []
    for changes in ({}, {"draft_level": draft_level, "draft_tokens": 6}):
        engine, found = Engine(tuned, 0, options(max_tokens=48, block_size=16, **changes)), []
        for length in range(30, 36):  # rounds end at other places
            prompt, heard = prompts(1, length, length, seed=length)[0], []
            engine.submit(prompt, 48 - length, heard.append, Sampling(temperature=0.0, logprobs=1))
            run(engine)
            found += [event.logprob.logprob for event in heard if event.logprob]
        said.append(found)
    assert said[1] == pytest.approx(said[0], abs=1e-4)
