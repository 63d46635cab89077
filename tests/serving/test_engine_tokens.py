"""What a request may ask of its tokens: each has its effect on its own text alone, whoever runs beside it."""

import pytest
import torch
from engine_texts import SMALL, Ear, alone, ask, assert_empty, options, prompts, run

from dsla_hf.inference.draws import Row, exactly
from dsla_hf.inference.graph import GraphDecoder, PlainRecording
from dsla_hf.inference.recorder import CudaRecording
from dsla_hf.inference.sampling import Sampling
from dsla_hf.serving.engine import engine as engine_module
from dsla_hf.serving.engine.engine import Engine, TooLong

PROMPT = [5, 6, 7, 6]


@pytest.fixture
def tuned(tiny_model, adapter_model):
    return adapter_model(tiny_model("llama"))


class Listening(Ear):
    """Keeps events whole."""

    def __init__(self):
        super().__init__()
        self.events = []

    def __call__(self, event):
        self.events.append(event)
        super().__call__(event)


def serve(engine, wanted):
    """Listeners of requests (prompt, tokens, sampling, more of `submit`), all served together."""
    ears = []
    for prompt, tokens, sampling, *more in wanted:
        ear = Listening()
        ear.request = engine.submit(prompt, tokens, ear, sampling, *more)
        ears.append(ear)
    run(engine)
    return ears


def logits_of(model, prompt, tokens, level):
    """Before each of the tokens, `[len(tokens), V]`, by a full forward."""
    model.set_level(level)
    with torch.no_grad():
        return model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].float()


def fails_once(run, call):
    """`run`, of which this call has no memory left."""
    calls = []

    def fails(*args):
        calls.append(args)
        if len(calls) == call:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(*args)

    return fails


def by_hand(model, prompt, count, sampling, level, change):
    """A text whose logits `change(logits [V], tokens)` changes first."""
    tokens = []
    for _ in range(count):
        logits = change(logits_of(model, prompt, [*tokens, 0], level)[-1].clone(), tokens)
        row = Row(sampling, sampling.seed or 0, len(prompt) + len(tokens))
        tokens.append(int(exactly(logits[None], [row])[0]) if sampling.temperature else int(logits.argmax()))
    return tokens


def penalised(sampling, prompt):
    def change(logits, tokens):
        seen = torch.tensor(sorted({*prompt, *tokens}))
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / sampling.repetition_penalty, values * sampling.repetition_penalty)
        times = torch.bincount(torch.tensor(tokens, dtype=torch.long), minlength=len(logits))
        logits -= sampling.frequency_penalty * times + sampling.presence_penalty * (times > 0)
        for token, gain in sampling.logit_bias:
            logits[token] += gain
        return logits

    return change


CHANGES = [
    Sampling(presence_penalty=1.5),
    Sampling(frequency_penalty=2.0),
    Sampling(frequency_penalty=-2.0),
    Sampling(repetition_penalty=1.8),
    Sampling(repetition_penalty=0.4, presence_penalty=-1.0),
    Sampling(logit_bias=((11, 100.0), (5, -100.0))),
    Sampling(1.0, top_k=30, repetition_penalty=1.3, frequency_penalty=0.5, logit_bias=((3, 1.5),), seed=-4),
]


def test_penalties_and_bias_beside_each_other(tuned):
    """Slots are used again, so counts of earlier texts must be gone; a text that asks for nothing gets what it would get alone."""
    engine = Engine(tuned, 2, SMALL)
    wanted = [(prompt, 10, sampling) for prompt, sampling in zip(prompts(len(CHANGES), 2, 12), CHANGES, strict=True)]
    wanted[3:3] = [(PROMPT, 10, Sampling())]
    ears = serve(engine, wanted)
    different = 0
    for (prompt, count, sampling), ear in zip(wanted, ears, strict=True):
        assert ear.tokens == by_hand(tuned, prompt, count, sampling, 2, penalised(sampling, prompt)), sampling
        different += ear.tokens != alone(tuned, prompt, count, 2)
    assert different == len(CHANGES)


def test_a_text_that_begins_anew_is_penalised_as_before(tuned, monkeypatch):
    sampling = Sampling(frequency_penalty=2.0, repetition_penalty=1.3)
    (expected,) = serve(Engine(tuned, 2, SMALL), [(PROMPT, 12, sampling)])
    engine = Engine(tuned, 2, options(slots=2))
    monkeypatch.setattr(engine.runner, "decode", fails_once(engine.runner.decode, 5))
    first, second = serve(engine, [(PROMPT, 12, sampling), (PROMPT, 12, sampling)])
    assert second.error is not None and first.tokens == expected.tokens and first.request.cached > 0


# --- draws ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [{}, {"top_k": 20}, {"top_p": 0.8}, {"top_k": 30, "top_p": 0.9, "min_p": 0.01}])
def test_sampled_texts_are_those_of_a_graph_decoder_with_their_seed(tuned, change):
    """At one level, whatever runs beside them; on a CPU, in fp32."""
    engine = Engine(tuned, 2, SMALL)
    wanted = [(prompt, 15, Sampling(0.8, seed=seed, **change)) for seed, prompt in enumerate(prompts(6, 1, 30), -3)]
    ears = serve(engine, wanted)
    tuned.set_level(2)
    for (prompt, tokens, sampling), ear in zip(wanted, ears, strict=True):
        decoder = GraphDecoder(tuned, record=PlainRecording)
        options_of = {"max_new_tokens": tokens, "do_sample": True, "temperature": 0.8, "top_k": 0, **change, "seed": sampling.seed}
        assert ear.tokens == decoder.generate(torch.tensor([prompt]), **options_of)[0, len(prompt) :].tolist()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_sampled_texts_on_a_gpu(tiny_model, adapter_model):
    """In fp32, by graphs and the kernels that draw: those of a graph decoder; with masks, penalties and log-probabilities as on a CPU."""
    model = adapter_model(tiny_model("llama", hidden_size=64, head_dim=16))
    ways = [
        Sampling(0.8, seed=1),
        Sampling(0.8, top_k=30, top_p=0.9, seed=2),
        Sampling(1.0, min_p=0.01, seed=3, frequency_penalty=1.0, repetition_penalty=1.2, logit_bias=((5, 2.0),), logprobs=3),
        Sampling(1.0, seed=4, min_tokens=5, prompt_logprobs=2),
    ]

    def served():
        engine = Engine(
            model, 2, options(block_size=16, chunk=96), eos_tokens={1}, record=CudaRecording if model.device.type == "cuda" else None
        )
        wanted = [(prompt, 15, sampling) for prompt, sampling in zip(prompts(4, 10, 30), ways, strict=True)]
        return serve(engine, [*wanted, (PROMPT, 3, Sampling(1.0, seed=5), Steps({31, 63, 95}, {0, 96}, {32}))])

    on_cpu = served()
    model.cuda()
    on_gpu = served()
    assert [ear.tokens for ear in on_gpu] == [ear.tokens for ear in on_cpu]
    for one, other in zip(on_gpu, on_cpu, strict=True):
        for event, like in zip(one.events, other.events, strict=True):
            for mine, its in ((event.logprob, like.logprob), *zip(event.prompt_logprobs or (), like.prompt_logprobs or (), strict=True)):
                assert (mine is None) == (its is None) and (mine is None or mine.logprob == pytest.approx(its.logprob, abs=1e-3))
    model.set_level(2)
    model.set_attn_implementation("sdpa")  # not that of the engine, whose cache lies in blocks
    prompt = on_gpu[0].request.prompt
    found = GraphDecoder(model).generate(
        torch.tensor([prompt], device="cuda"), max_new_tokens=15, do_sample=True, temperature=0.8, top_k=0, seed=1
    )
    assert on_gpu[0].tokens == found[0, len(prompt) :].tolist()


def test_sampled_texts_follow_raises_as_a_graph_decoder_does(tuned):
    level = [0]
    engine = Engine(tuned, lambda stats: level[0], SMALL)
    wanted = [(prompt, 20, Sampling(1.0, seed=seed)) for seed, prompt in enumerate(prompts(3, 4, 8))]
    ears = []
    for prompt, tokens, sampling in wanted:
        ears.append(Ear())
        ears[-1].request = engine.submit(prompt, tokens, ears[-1], sampling)
    for raised in (0, 1, 3):
        level[0] = raised
        for _ in range(5):
            engine.step()
    run(engine)
    for (prompt, tokens, sampling), ear in zip(wanted, ears, strict=True):
        (_, first), *raises = ear.request.levels
        assert first == 0 and [to for _, to in raises] == [1, 3] and raises[0][0] > len(prompt)
        tuned.set_level(0)
        found = GraphDecoder(tuned, record=PlainRecording).generate(
            torch.tensor([prompt]),
            max_new_tokens=tokens,
            do_sample=True,
            top_k=0,
            seed=sampling.seed,
            level_policy=lambda stats, raises=raises: max([0, *(to for at, to in raises if stats.tokens >= at)]),
        )
        assert ear.tokens == found[0, len(prompt) :].tolist()


def test_a_text_without_a_seed_has_one_of_its_own(tuned):
    ears = serve(Engine(tuned, 2, SMALL), [(PROMPT, 12, Sampling(2.0))] * 4)
    assert len({tuple(ear.tokens) for ear in ears}) == 4 and len({ear.request.seed for ear in ears}) == 4


def test_too_few_candidates_do_not_change_a_text(tuned, monkeypatch):
    sampling = [Sampling(1.5, top_p=0.99, seed=i, frequency_penalty=0.5, logprobs=1) for i in range(4)]
    wanted = [(prompt, 9, how) for prompt, how in zip(prompts(4, 3, 9), sampling, strict=True)]
    expected = serve(Engine(tuned, 2, SMALL), wanted)
    few = []
    real = engine_module.NextTokens.__call__.__globals__["draw"]

    def draw_with_few(scores, rows):
        tokens, sure = real(scores, rows, 4)
        few.append(bool(sure.all()))
        return tokens.where(sure, torch.zeros_like(tokens)), sure

    monkeypatch.setattr("dsla_hf.inference.draws.TIES", 0)
    monkeypatch.setattr("dsla_hf.serving.engine.tokens.draw", draw_with_few)
    found = serve(Engine(tuned, 2, SMALL), wanted)
    assert not all(few)
    for one, other in zip(found, expected, strict=True):
        assert one.tokens == other.tokens
        for event, like in zip(one.events[:-1], other.events[:-1], strict=True):
            assert event.logprob.token == like.token and event.logprob.logprob == pytest.approx(like.logprob.logprob, abs=1e-4)


# --- log-probabilities ------------------------------------------------------------------------------------------


def test_log_probabilities_are_the_models_own(tuned):
    """Before temperature, bias and penalties; of rows that ask, as many as they ask for."""
    wanted = [
        (PROMPT, 6, Sampling(logprobs=0)),
        (PROMPT, 6, Sampling(3.0, logprobs=3, seed=1, logit_bias=((5, 20.0),), frequency_penalty=1.0)),
        (PROMPT, 6, Sampling()),
        (PROMPT, 6, Sampling(logprobs=20)),
    ]
    ears = serve(Engine(tuned, 2, SMALL), wanted)
    for (prompt, _, sampling), ear in zip(wanted, ears, strict=True):
        events = ear.events[:-1]
        assert ear.events[-1].logprob is None
        if sampling.logprobs is None:
            assert all(event.logprob is None for event in events)
            continue
        expected = logits_of(tuned, prompt, ear.tokens, 2).log_softmax(-1)
        for event, row in zip(events, expected, strict=True):
            check_logprob(event.logprob, event.token, row, sampling.logprobs)


def check_logprob(logprob, token, row, most):
    assert logprob.token == token and logprob.logprob == pytest.approx(float(row[token]), abs=1e-4)
    values, ids = row.topk(most)
    assert [token for token, _ in logprob.top] == ids.tolist()
    assert [value for _, value in logprob.top] == pytest.approx(values.tolist(), abs=1e-4)


@pytest.mark.parametrize("rows_at_once, bytes_at_once", [(2**23, 2**28), (97 * 3, 97 * 4 * 5)])
@pytest.mark.parametrize("record", [None, PlainRecording])
def test_log_probabilities_of_prompts(tuned, monkeypatch, record, rows_at_once, bytes_at_once):
    """In one piece or many, with others that are read and generated at the same time."""
    monkeypatch.setattr("dsla_hf.serving.engine.tokens.LOGITS_AT_ONCE", rows_at_once)
    monkeypatch.setattr(engine_module, "LOGITS_BYTES", bytes_at_once)
    monkeypatch.setattr(engine_module, "MIN_CHUNK", 5)
    engine = Engine(tuned, 2, options(chunk=16), record=record)
    wanted = [
        (prompt, 4, Sampling(prompt_logprobs=most)) for prompt, most in zip([*prompts(4, 20, 50), [9]], (0, 2, None, 20, 1), strict=True)
    ]
    ears = serve(engine, wanted)
    for (prompt, count, sampling), ear in zip(wanted, ears, strict=True):
        assert ear.tokens == alone(tuned, prompt, count, 2)
        told = [event.prompt_logprobs for event in ear.events]
        assert told[1:] == [None] * count
        if sampling.prompt_logprobs is None:
            assert told[0] is None
            continue
        expected = logits_of(tuned, prompt[:1], prompt[1:], 2).log_softmax(-1)
        assert len(told[0]) == len(prompt) - 1
        for logprob, token, row in zip(told[0], prompt[1:], expected, strict=True):
            check_logprob(logprob, token, row, sampling.prompt_logprobs)
    assert_empty(engine)


def test_log_probabilities_of_a_prompt_that_begins_anew(tuned, monkeypatch):
    """Memory fails in its third piece; and a prompt's come with its end where its first token ends it."""
    (prompt,) = prompts(1, 40, 40)
    (first,) = alone(tuned, prompt, 1, 2)
    engine = Engine(tuned, 2, options(chunk=64), eos_tokens={first})
    engine._set_chunk(16)
    monkeypatch.setattr(engine.runner, "prefill_scored", fails_once(engine.runner.prefill_scored, 3))
    kept, shed = serve(engine, [(prompt, 4, Sampling(prompt_logprobs=1)), ([3], 3, Sampling())])
    if kept.error is not None:  # the newest of the step is given up: here the only one
        (kept,) = serve(engine, [(prompt, 4, Sampling(prompt_logprobs=1))])
    assert kept.finish == "stop" and not kept.tokens and len(kept.events) == 1
    expected = logits_of(tuned, prompt[:1], prompt[1:], 2).log_softmax(-1)
    for logprob, token, row in zip(kept.events[0].prompt_logprobs, prompt[1:], expected, strict=True):
        check_logprob(logprob, token, row, 1)


# --- ends -------------------------------------------------------------------------------------------------------


def test_stop_tokens_and_the_least_number_of_tokens(tuned):
    def drawn(**more):
        return Sampling(2.0, seed=1, **more)

    def kept(logits, tokens):
        return logits

    text = by_hand(tuned, PROMPT, 12, drawn(), 2, kept)
    end, stop = text[4], text[2]
    assert text.index(end) == 4 and text.index(stop) == 2
    engine = Engine(tuned, 2, options(slots=8), eos_tokens={end})
    ways = [
        drawn(stop_token_ids=(stop, 90)),
        drawn(stop_token_ids=(stop,), ignore_eos=True),
        drawn(ignore_eos=True),
        drawn(min_tokens=2, stop_token_ids=(stop,)),
        drawn(),
    ]
    late = [drawn(min_tokens=7), drawn(min_tokens=12, stop_token_ids=(stop,), ignore_eos=True)]
    ears = serve(engine, [(PROMPT, 12, sampling) for sampling in [*ways, *late]])
    assert [ear.tokens for ear in ears[:5]] == [text[:2], text[:2], text, text[:2], text[:4]]
    assert [ear.finish for ear in ears[:5]] == ["stop", "stop", "length", "stop", "stop"]
    for ear, (least, never) in zip(ears[5:], ((7, {end}), (12, {end, stop})), strict=True):

        def change(logits, tokens, least=least, never=never):
            if len(tokens) < least:
                logits[list(never)] = -torch.inf
            return logits

        expected = by_hand(tuned, PROMPT, 12, drawn(), 2, change)
        assert len(ear.tokens) >= least and ear.tokens == expected[: len(ear.tokens)] and not never & set(ear.tokens[:least])
        assert len(ear.tokens) == 12 or (ear.finish == "stop" and expected[len(ear.tokens)] == end)


# --- constraints ------------------------------------------------------------------------------------------------


def mask_of(tokens, words=4):
    mask = torch.zeros(words, dtype=torch.int64)
    for token in tokens:
        mask[token // 32] |= 1 << token % 32
    return mask.to(torch.int32)  # wraps the highest bit


class Steps:
    """Allows one set of tokens after another, then ends; keeps what it was told."""

    def __init__(self, *steps, words=4):
        self.steps, self.accepted, self.asked, self.words = [*steps], [], 0, words

    def mask(self):
        self.asked += 1
        return mask_of(self.steps[len(self.accepted)], self.words)

    def accept(self, token):
        assert token in self.steps[len(self.accepted)]
        self.accepted.append(token)


def test_constraints_hold_for_their_own_texts(tuned):
    """Greedy and by chance; bits 31 and 32; an end of text is accepted, too."""
    steps = [{31, 63, 95}, {0, 96}, {32}, {64, 5}, {1}]
    grammar, drawn, tops = Steps(*steps), Steps(*steps), Steps(*steps)
    engine = Engine(tuned, 2, SMALL, eos_tokens={1})
    ears = serve(
        engine,
        [
            (PROMPT, 12, Sampling(), grammar),
            (PROMPT, 12, Sampling(5.0, seed=2), drawn),
            (PROMPT, 8, Sampling(ignore_eos=True)),
            (PROMPT, 12, Sampling(1.0, top_k=3, top_p=0.9, seed=2, frequency_penalty=1.0), tops),
        ],
    )

    def change(logits, tokens):
        allowed = torch.tensor(sorted(steps[len(tokens)]))
        return torch.full_like(logits, -torch.inf).index_copy(0, allowed, logits[allowed])

    expected = by_hand(tuned, PROMPT, 5, Sampling(), 2, change)
    assert [*ears[0].tokens, 1] == expected == grammar.accepted and grammar.asked == 5
    for ear, one in ((ears[1], drawn), (ears[3], tops)):
        assert [*ear.tokens, 1] == one.accepted and ear.finish == "stop"
        assert all(token in step for token, step in zip(one.accepted, steps, strict=True))
    assert ears[2].tokens == alone(tuned, PROMPT, 8, 2)


def test_an_end_that_a_grammar_demands_comes_before_its_time(tuned):
    """`min_tokens` rules an end out only where something else may come."""
    engine = Engine(tuned, 2, SMALL, eos_tokens={1})
    grammar = Steps({1, 9}, {1})
    (ear,) = serve(engine, [(PROMPT, 12, Sampling(min_tokens=5), grammar)])
    assert grammar.accepted == [9, 1] and ear.finish == "stop"


@pytest.mark.parametrize("fault", ["mask", "accept", "nothing", "shape"])
def test_an_error_of_a_constraint_ends_its_request_alone(tuned, fault):
    class Broken(Steps):
        def mask(self):
            if fault == "mask" and len(self.accepted) == 2:
                raise RuntimeError("broken mask")
            found = super().mask()
            return found.long() if fault == "shape" and len(self.accepted) == 2 else found

        def accept(self, token):
            if fault == "accept" and len(self.accepted) == 2:
                raise RuntimeError("broken accept")
            super().accept(token)

    engine = Engine(tuned, 2, SMALL)
    steps = [{7}, {8}, set() if fault == "nothing" else {9}, {9}, {9}]
    broken, healthy = serve(engine, [(PROMPT, 5, Sampling(1.0), Broken(*steps)), (PROMPT, 9, Sampling(temperature=1.0, seed=3))])
    words = {"mask": "broken mask", "accept": "broken accept", "nothing": "allows no token", "shape": "int32"}
    assert broken.tokens == [7, 8] and words[fault] in str(broken.error)
    assert healthy.finish == "length" and len(healthy.tokens) == 9
    assert_empty(engine)


def test_masks_of_another_size_allow_what_both_have(tuned):
    """A tokenizer may have fewer tokens than the model has rows, or more."""
    short, long = Steps({5, 6}, {7}, words=1), Steps({5, 99, 150}, {7}, words=9)
    ears = serve(Engine(tuned, 2, SMALL), [(PROMPT, 2, Sampling(), short), (PROMPT, 2, Sampling(), long)])
    assert ears[0].finish == "length" and ears[1].tokens == [5, 7]


# --- levels -----------------------------------------------------------------------------------------------------


def test_a_pinned_text_keeps_its_level_and_holds_nobody_up(tuned):
    level = [1]
    engine = Engine(tuned, lambda stats: level[0], options(slots=6))
    (early,) = ask(engine, [(PROMPT, 40)])
    pinned = Ear(), Ear()
    low = engine.submit([8, 9, 10], 30, pinned[0], None, None, 0)
    high = engine.submit([8, 9, 10], 30, pinned[1], Sampling(1.0, seed=3), level=4)
    for _ in range(4):
        engine.step()
    assert engine.old_level is None
    level[0] = 3
    run(engine)
    assert low.levels == [(3, 0)] and high.levels == [(3, 4)] and [to for _, to in early.request.levels] == [1, 3]
    at = early.request.levels[1][0]
    assert early.tokens == alone(tuned, PROMPT, 40, 1, level_policy=lambda stats: 3 if stats.tokens >= at else 1)
    assert pinned[0].tokens == alone(tuned, [8, 9, 10], 30, 0)
    tuned.set_level(4)
    found = GraphDecoder(tuned, record=PlainRecording).generate(
        torch.tensor([[8, 9, 10]]), max_new_tokens=30, do_sample=True, top_k=0, seed=3
    )
    assert pinned[1].tokens == found[0, 3:].tolist()
    assert_empty(engine)


def test_levels_that_cannot_be_kept_are_refused(tuned):
    with pytest.raises(ValueError, match="level 1 cannot be kept: this server runs at 2; give"):
        Engine(tuned, 2, SMALL).submit(PROMPT, 3, Ear(), level=1)
    engine = Engine(tuned, lambda stats: 0, options(max_level=2))
    with pytest.raises(ValueError, match="runs at 0, 1, 2; give"):
        engine.submit(PROMPT, 3, Ear(), level=3)
    small = Engine(tuned, lambda stats: 0, options(kv_bytes=4 * 40 * 128))  # 40 tokens of all four layers
    with pytest.raises(TooLong, match="blocks"):
        small.submit([5] * 60, 4, Ear(), level=0)


def test_a_pinned_text_waits_until_it_fits(tuned):
    engine = Engine(tuned, lambda stats: 0, options(kv_bytes=4 * 40 * 128))
    first, second = Ear(), Ear()
    engine.submit([5] * 30, 5, first, level=0)
    engine.submit([6] * 30, 5, second, level=0)
    engine.step()
    assert len(engine.scheduler.waiting) == 1
    run(engine)
    assert first.finish == second.finish == "length" and engine.control.level == 0
    assert second.tokens == alone(tuned, [6] * 30, 5, 0)
    assert_empty(engine)


@pytest.mark.parametrize(
    "sampling, words",
    [
        (Sampling(logit_bias=((97, 1.0),)), "logit_bias has token 97: ids go from 0 to 96"),
        (Sampling(stop_token_ids=(5, -1)), "stop_token_ids has token -1"),
        (Sampling(min_tokens=4), "min_tokens 4 is more than max_tokens 3"),
    ],
)
def test_requests_that_ask_for_what_is_not_there(tuned, sampling, words):
    with pytest.raises(ValueError, match=words):
        Engine(tuned, 0, SMALL).submit(PROMPT, 3, Ear(), sampling)
