"""Pieces of several prompts in one call, where all layers are softmax attention: the same texts, fewer calls."""

import pytest
import torch
from engine_texts import Ear, alone, ask, assert_empty, options, prompts, recorded, run

from dsla_hf.inference.recorder import CudaRecording, PlainRecording
from dsla_hf.inference.sampling import Sampling
from dsla_hf.serving.engine.engine import Engine, ShedForMemory

ROW = 4


@pytest.fixture
def small_rows(in_blocks, monkeypatch):
    """Calls read keys and values in their blocks; rows of 4 tokens, which are pieces of prompts, not steps of several tokens."""
    for module in ("runner", "graphs"):
        monkeypatch.setattr(f"dsla_hf.serving.engine.{module}.ROW", ROW)
    monkeypatch.setattr("dsla_hf.serving.engine.graphs.SMALLEST_PIECE", ROW)
    monkeypatch.setattr("dsla_hf.inference.decode_attention.FEW", 1)


def watch(engine):
    """(request number, tokens) of each call that reads prompts."""
    calls, runner = [], engine.runner
    one, several = runner.prefill, runner.prefill_together

    def noted(request, tokens):
        calls.append([(request.number, tokens)])
        return one(request, tokens)

    def noted_together(pieces):
        calls.append([(request.number, tokens) for request, tokens in pieces])
        return several(pieces)

    runner.prefill, runner.prefill_together = noted, noted_together
    return calls


def expected(model, wanted, level=0):
    return [alone(model, prompt, tokens, level) for prompt, tokens in wanted]


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "mixtral"])  # also sliding windows, experts
@pytest.mark.parametrize("record", [None, "watched"])
def test_texts_are_those_of_generate_alone(tiny_model, adapter_model, small_rows, watched_recording, kind, record):
    model = adapter_model(tiny_model(kind))
    engine = Engine(model, 0, options(slots=6, chunk=32), record=watched_recording if record else None)
    calls = watch(engine)
    wanted = [(prompt, 3 + i % 4) for i, prompt in enumerate(prompts(14, 1, 45, seed=5))]
    ears = ask(engine, wanted)
    run(engine)
    assert [ear.tokens for ear in ears] == expected(model, wanted)
    assert any(len(call) > 2 for call in calls) and any(len(call) == 1 for call in calls)
    if record:
        assert {key[2] for key in recorded(engine)[1]} >= {"together", "first"}
        assert engine.snapshot()["calls"]["plain"] == 0
    assert_empty(engine)


@pytest.mark.parametrize("unit", ["layers", "heads"])
def test_kernels_read_them_in_blocks(tiny_model, adapter_model, head_model, unit, interpreted_kernels, monkeypatch):
    """Rows of 64 tokens; heads lie in blocks of several groups where levels count heads."""
    order = [[1, 0], [0, 1], [1, 1]] if unit == "heads" else [1, 0]
    make = head_model if unit == "heads" else lambda kind, base, **config: adapter_model(tiny_model(kind, **base), **config)
    model = make("llama", base={"num_hidden_layers": 2}, conversion_order=order)
    engine = Engine(model, 0, options(chunk=256, block_size=16), record=PlainRecording)
    assert engine.runner.in_blocks
    calls = watch(engine)
    first, second, third = prompts(3, 70, 70, seed=7)
    wanted = [(first, 2), (second[:9], 2), (third[:20], 2)]
    ears = ask(engine, wanted)
    run(engine)
    monkeypatch.setattr("dsla_kernels.dispatch.choice", "auto")
    assert [ear.tokens for ear in ears] == expected(model, wanted)
    assert [[tokens for _, tokens in call] for call in calls] == [[70, 9, 20]]


def test_recordings_are_made_ahead_and_read_no_value(tiny_model, adapter_model, small_rows, watched_recording):
    model = adapter_model(tiny_model("llama"))
    engine = Engine(model, 0, options(chunk=16, slots=5), record=watched_recording)
    engine.prepare([0])
    ahead = {key for key in recorded(engine)[1] if key[2] == "together"}
    assert ahead == {(0, size, "together") for size in (8, 16)}
    wanted = [(prompt, 4) for prompt in prompts(9, 2, 9, seed=8)]
    ears = ask(engine, wanted)
    run(engine)
    assert [ear.tokens for ear in ears] == expected(model, wanted)
    assert {key for key in recorded(engine)[1] if key[2] == "together"} == ahead


def test_a_call_holds_no_more_than_a_chunk(tiny_model, small_rows):
    model = tiny_model("llama")
    for record, most in ((None, 16), (PlainRecording, 16)):
        engine = Engine(model, 0, options(slots=6, chunk=16, prefix_reuse=False), record=record)
        calls = watch(engine)
        wanted = [(prompt, 2) for prompt in prompts(12, 1, 30, seed=2)]
        ears = ask(engine, wanted)
        run(engine)
        assert [ear.tokens for ear in ears] == expected(model, wanted, None)
        together = [call for call in calls if len(call) > 1]
        assert together and all(sum(tokens for _, tokens in call) <= most for call in together)
        if record:  # rows are whole in a recording
            assert all(sum(-(-tokens // ROW) * ROW for _, tokens in call) <= most for call in together)


def test_not_above_level_0_nor_alone(tiny_model, adapter_model, small_rows):
    """States go from token to token; batch_invariant has each prompt alone; log-probabilities of a prompt are of all its tokens."""
    model = adapter_model(tiny_model("llama"))
    for level, changes, sampling in (
        (2, {}, None),
        (0, {"batch_invariant": True}, None),
        (0, {}, Sampling(prompt_logprobs=0)),
    ):
        engine = Engine(model, level, options(chunk=32, **changes))
        calls = watch(engine)
        for prompt in prompts(4, 2, 6, seed=3):
            engine.submit(prompt, 2, Ear(), sampling)
        run(engine)
        assert all(len(call) == 1 for call in calls), (level, changes, sampling)


def test_what_begins_as_another_does_is_read_behind_it(tiny_model, small_rows):
    """Of two texts with the same first blocks the second finds them, though both have come at once; a third one shares the first's call."""
    model = tiny_model("llama")
    engine = Engine(model, 0, options(slots=4, chunk=64))
    calls = watch(engine)
    same, other = prompts(2, 8, 8, seed=9)
    wanted = [(same + [11, 12], 3), (other + [5], 3), (same + [13], 3)]
    ears = ask(engine, wanted)
    run(engine)
    assert [ear.tokens for ear in ears] == expected(model, wanted, None)
    numbers = [ear.request.number for ear in ears]
    assert [[number for number, _ in call] for call in calls] == [numbers[:2], numbers[2:]]
    assert ears[2].request.reused == 8 and engine.prefix_hits == 8 and calls[1] == [(numbers[2], 1)]


def test_texts_that_share_nothing_new_share_a_call(tiny_model, small_rows):
    """Of blocks that both begin with nothing is read: what follows differs."""
    model = tiny_model("llama")
    engine = Engine(model, 0, options(slots=4, chunk=64))
    first = prompts(1, 8, 8, seed=9)[0]
    ask(engine, [(first + [3], 2)])
    run(engine)
    calls = watch(engine)
    wanted = [(first + [11, 12, 13, 14, 15], 3), (first + [21, 22, 23, 24, 25], 3)]
    ears = ask(engine, wanted)
    run(engine)
    assert [ear.tokens for ear in ears] == expected(model, wanted, None)
    assert [[tokens for _, tokens in call] for call in calls] == [[5, 5]]
    assert [ear.request.reused for ear in ears] == [8, 8]


def test_draws_are_those_of_texts_alone(tiny_model, small_rows):
    model, texts = tiny_model("llama"), {}
    for together in (True, False):
        engine = Engine(model, 0, options(slots=4, chunk=32))
        for number, prompt in enumerate(prompts(4, 3, 9, seed=4)):
            ear = Ear()
            engine.submit(prompt, 6, ear, Sampling(temperature=0.8, seed=number))
            if not together:
                run(engine)
            texts.setdefault(number, []).append(ear)
        run(engine)
    assert all(first.tokens == second.tokens and first.tokens for first, second in texts.values())


def test_of_a_call_that_fails_each_text_is_tried_alone_once(tiny_model, small_rows):
    """What makes calls fail is the second of three texts, whether it is read with others or alone."""
    model = tiny_model("llama")
    wanted = [(prompt, 3) for prompt in prompts(3, 3, 9, seed=4)]
    engine = Engine(model, 0, options(slots=4, chunk=32))
    one, several = engine.runner.prefill, engine.runner.prefill_together
    error, tried = RuntimeError("broken"), []

    def of(pieces):
        tried.append([request.number for request, _ in pieces])
        if ears[1].request.number in tried[-1]:
            raise error

    def alone_of(request, tokens):
        of([(request, tokens)])
        return one(request, tokens)

    def together(pieces):
        of(pieces)
        return several(pieces)

    engine.runner.prefill, engine.runner.prefill_together = alone_of, together
    ears = ask(engine, wanted)
    run(engine)
    numbers = [ear.request.number for ear in ears]
    assert tried == [numbers, *([number] for number in numbers)]
    assert ears[1].error is error and not ears[1].tokens
    assert [ears[n].tokens for n in (0, 2)] == expected(model, [wanted[0], wanted[2]], None)
    assert engine.health.failed_steps == 2 and engine.problem is None and engine.finished["error"] == 1
    assert_empty(engine)


def test_a_call_that_fails_once_ends_no_text(tiny_model, small_rows, monkeypatch):
    """Also if the error comes when first tokens are chosen; later texts share calls again."""
    model = tiny_model("llama")
    wanted = [(prompt, 3) for prompt in prompts(3, 3, 9, seed=4)]
    for what in ("runner.prefill_together", "next_tokens"):
        engine = Engine(model, 0, options(slots=4, chunk=32))
        owner, name = (engine.runner, "prefill_together") if "." in what else (engine, what)
        real, failed = getattr(owner, name), []

        def fail(*args, real=real, failed=failed):
            if not failed:
                failed.append(True)
                raise RuntimeError("broken")
            return real(*args)

        monkeypatch.setattr(owner, name, fail)
        ears = ask(engine, wanted)
        run(engine)
        assert failed and [ear.tokens for ear in ears] == expected(model, wanted, None)
        calls = watch(engine)
        ears = ask(engine, [(prompt[::-1], tokens) for prompt, tokens in wanted])
        run(engine)
        assert len(calls[0]) == 3 and not any(ear.error for ear in ears)
        assert_empty(engine)


def test_lack_of_memory_is_of_the_newest_and_what_stays_with_the_device_of_all(tiny_model, small_rows, monkeypatch):
    model = tiny_model("llama")
    wanted = [(prompt, 3) for prompt in prompts(3, 3, 9, seed=4)]
    for error in (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: device-side assert triggered")):
        engine = Engine(model, 0, options(slots=4, chunk=32))
        real, failed = engine.runner.prefill_together, []

        def fail(pieces, real=real, error=error, failed=failed):
            if not failed:
                failed.append(True)
                raise error
            return real(pieces)

        monkeypatch.setattr(engine.runner, "prefill_together", fail)
        ears = ask(engine, wanted)
        run(engine)
        if isinstance(error, torch.OutOfMemoryError):
            assert isinstance(ears[2].error, ShedForMemory) and engine.chunk == 16
            assert [ear.tokens for ear in ears[:2]] == expected(model, wanted[:2], None)
        else:
            assert all(ear.error is error for ear in ears) and engine.health.fatal
        assert_empty(engine)


def test_more_slots_than_a_power_of_two(tiny_model, small_rows, watched_recording):
    """80 texts run at a time."""
    model = tiny_model("llama", num_hidden_layers=2)
    engine = Engine(model, 0, options(slots=80, chunk=64, max_waiting=100, kv_bytes=2**22), record=watched_recording)
    wanted = [(prompt, 12) for prompt in prompts(90, 3, 9, seed=6)]
    ears = ask(engine, wanted)
    most = 0
    while engine.step() or engine.busy:
        most = max(most, len(engine.scheduler.running))
    assert most == 80 and max(rows for _, rows, _ in recorded(engine)[0]) == 80
    assert [ear.tokens for ear in ears] == expected(model, wanted, None)
    assert_empty(engine)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_graphs_read_prompts_together(tiny_model, adapter_model):
    model = adapter_model(tiny_model("llama", hidden_size=64, head_dim=16), level=0).cuda()
    engine = Engine(model, 0, options(block_size=16, chunk=256, slots=24), record=CudaRecording)
    engine.prepare([0])
    ahead, calls = recorded(engine), watch(engine)
    wanted = [(prompt, 8) for prompt in prompts(24, 3, 100, seed=5)]
    ears = ask(engine, wanted)
    run(engine)
    assert recorded(engine) == ahead and engine.runner.recorder.reason is None and any(len(call) > 2 for call in calls)
    for (prompt, tokens), ear in zip(wanted, ears, strict=True):
        ids = torch.tensor([prompt], device="cuda")
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
        assert ear.tokens == out[0, len(prompt) :].tolist()
    assert_empty(engine)
