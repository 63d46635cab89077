"""The engine: every text is what `generate` alone gives, whatever else runs; nothing is lost and nothing leaks."""

import random

import pytest
import torch
from engine_texts import SMALL, Ear, alone, ask, assert_empty, check_served, options, prompts, recorded, run
from peft import get_peft_model
from prometheus_client import generate_latest

from dsla_hf import DSLAConfig, Load
from dsla_hf.inference.recorder import CudaRecording, PlainRecording
from dsla_hf.inference.sampling import Sampling
from dsla_hf.serving.engine.engine import Draining, Engine, ShedForMemory
from dsla_hf.serving.engine.graphs import piece_sizes
from dsla_hf.serving.engine.recent import RecentMean
from dsla_hf.serving.engine.scheduler import QueueFull
from dsla_hf.serving.http.metrics import Metrics


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def tuned(request, tiny_model, adapter_model):
    kind, config = getattr(request, "param", ("llama", {}))
    return adapter_model(tiny_model(kind, **config))


@pytest.mark.parametrize("level", [0, 2, 4])
def test_texts_are_those_of_generate_alone(base_kind, tiny_model, adapter_model, level):
    model = adapter_model(tiny_model(base_kind))
    wanted = [(prompt, 3 + 5 * i % 17) for i, prompt in enumerate(prompts(9))]
    engine = Engine(model, level, SMALL)
    ears = ask(engine, wanted)
    run(engine)
    for (prompt, tokens), ear in zip(wanted, ears, strict=True):
        assert ear.tokens == alone(model, prompt, tokens, level) and ear.finish == "length"
        assert ear.request.levels == [(len(prompt), level)]
    assert_empty(engine)


@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text", "phi3", "gpt_oss", "cohere2", "mixtral"])
def test_other_architectures(tiny_model, adapter_model, kind):
    model = adapter_model(tiny_model(kind))
    engine = Engine(model, 2, SMALL)
    check_served(engine, model, prompts(5, longest=30), 8, 2)


def test_layer_without_window(tiny_model, adapter_model):
    model = adapter_model(tiny_model("llama"), window_size=0)
    engine = Engine(model, 3, SMALL)
    check_served(engine, model, prompts(5), 8, 3)


def test_base_alone_and_hybrid(tiny_model, adapter_model):
    base = tiny_model("llama")
    engine = Engine(base, "load", SMALL)
    check_served(engine, base, prompts(5), 6)
    assert engine.control.highest == 0

    model = adapter_model(base)
    model.set_level(3)
    hybrid = model.merge_and_unload().eval()
    engine = Engine(hybrid, "load", SMALL)
    check_served(engine, hybrid, prompts(5), 6)
    assert engine.control.level == 3


def test_texts_join_and_leave_at_token_boundaries(tuned):
    engine = Engine(tuned, 2, SMALL)
    first, second = prompts(2, 10, 10)
    early = ask(engine, [(first, 30)])[0]
    for _ in range(5):
        engine.step()
    late = ask(engine, [(second, 4)])[0]
    run(engine)
    assert early.tokens == alone(tuned, first, 30, 2) and late.tokens == alone(tuned, second, 4, 2)
    assert late.request.finished < early.request.finished


def test_a_long_prompt_does_not_stall_the_others(tuned):
    engine = Engine(tuned, 0, SMALL)
    short, long = [5, 6, 7], prompts(1, 120, 120)[0]
    running = ask(engine, [(short, 100)])[0]
    engine.step()
    waiting = ask(engine, [(long, 3)])[0]
    for step in range(15):  # 120 tokens in chunks of 8
        before = len(running.tokens)
        assert not waiting.tokens
        engine.step()
        assert len(running.tokens) == before + 1, step
    assert waiting.tokens
    run(engine)
    assert waiting.tokens == alone(tuned, long, 3, 0) and running.tokens == alone(tuned, short, 100, 0)


def test_cancelled_requests_free_their_place_at_once(tuned):
    engine = Engine(tuned, 1, options(slots=1))
    first, second = ask(engine, [([5, 6, 7], 50), ([8, 9], 3)])
    for _ in range(4):
        engine.step()
    engine.cancel(first.request)
    engine.step()
    assert first.finish == "cancelled" and second.request.slot == 0
    waiting = ask(engine, [([3], 3)])[0]
    engine.cancel(waiting.request)
    run(engine)
    assert waiting.finish == "cancelled" and not waiting.tokens and second.tokens == alone(tuned, [8, 9], 3, 1)
    assert_empty(engine)


def test_a_text_ends_at_an_end_token_unless_told_otherwise(tuned):
    prompt = [5, 6, 7]
    text = alone(tuned, prompt, 12, 2)
    engine = Engine(tuned, 2, SMALL, eos_tokens={text[4]})
    stops, goes_on = Ear(), Ear()
    engine.submit(prompt, 12, stops)
    engine.submit(prompt, 12, goes_on, Sampling(ignore_eos=True))
    run(engine)
    assert stops.tokens == text[: text.index(text[4])] and stops.finish == "stop"
    assert goes_on.tokens == text and goes_on.finish == "length"


def test_draws_depend_on_the_seed_and_not_on_company(tuned):
    sampling = Sampling(temperature=0.9, top_p=0.8, seed=3)
    texts = []
    for others in (0, 3):
        engine = Engine(tuned, 2, SMALL)
        ask(engine, [(prompt, 9) for prompt in prompts(others)])
        ear = Ear()
        engine.submit([5, 6, 7], 12, ear, sampling)
        run(engine)
        texts.append(ear.tokens)
    assert texts[0] == texts[1] != alone(tuned, [5, 6, 7], 12, 2)


# --- levels -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tuned",
    [("llama", {}), ("phi3", {"partial_rotary_factor": 0.5}), ("cohere2", {"layer_types": ["full_attention"] * 4})],
    ids=["llama", "rotary on a part", "interleaved"],
    indirect=True,
)
def test_a_raise_folds_running_texts_exactly_and_frees_their_blocks(tuned):
    wanted = [(prompt, 20) for prompt in prompts(3, 10, 30)]
    level = [0]
    engine = Engine(tuned, lambda stats: level[0], SMALL)
    ears = ask(engine, wanted)
    for step in range(12):
        engine.step()
        if step == 3:  # the longest prompt is still being read
            assert any(ear.request.unread > 1 for ear in ears)
            before, level[0] = engine.memory.pool.free_blocks, 1
        if step == 4:
            assert engine.memory.pool.free_blocks > before
    level[0] = 3
    run(engine)
    for (prompt, tokens), ear in zip(wanted, ears, strict=True):
        (_, first), *raises = ear.request.levels
        assert first == 0 and [to for _, to in raises] in ([1, 3], [1])

        def policy(stats, raises=raises, prompt=prompt):
            # As `generate` counts: a raise here came before the forward that makes token `at`.
            return max([to for at, to in raises if at > len(prompt) and stats.tokens >= at], default=0)

        if all(at > len(prompt) for at, _ in raises):
            assert ear.tokens == alone(tuned, prompt, tokens, 0, level_policy=policy)
    assert any(ear.request.levels[-1][0] > len(prompt) for (prompt, _), ear in zip(wanted, ears, strict=True))
    assert_empty(engine)


def test_a_raise_while_a_prompt_is_read(tuned):
    """The states after folding half a prompt and reading on are those of `generate` with a chunked prefill raised in between."""
    level, prompt = [0], prompts(1, 40, 40)[0]
    engine = Engine(tuned, lambda stats: level[0], SMALL)
    ear = ask(engine, [(prompt, 10)])[0]
    engine.step(), engine.step()
    level[0] = 4
    run(engine)

    def policy(stats):
        return 4 if stats.tokens > 16 and asked[0] > 1 else 0

    asked = [0]

    def counted(stats):
        asked[0] += 1
        return policy(stats)

    assert ear.tokens == alone(tuned, prompt, 10, 0, level_policy=counted, prefill_chunk_size=8)


def test_a_lower_level_is_for_newcomers_and_waits_for_the_old_cohort(tuned):
    level = [3]
    engine = Engine(tuned, lambda stats: level[0], SMALL)
    (old,) = ask(engine, [([5, 6, 7], 20)])
    for _ in range(3):
        engine.step()
    level[0] = 1
    (new,) = ask(engine, [([8, 9, 10], 40)])
    engine.step()
    assert engine.control.level == 1 and engine.old_level == 3
    level[0] = 4  # not before the old cohort is gone
    while old.finish is None:
        engine.step()
        assert engine.control.level == 1
    engine.step()
    assert engine.control.level == 4 and engine.old_level is None
    run(engine)
    assert old.tokens == alone(tuned, [5, 6, 7], 20, 3) and [to for _, to in new.request.levels] == [1, 4]
    at = new.request.levels[1][0]
    assert new.tokens == alone(tuned, [8, 9, 10], 40, 1, level_policy=lambda stats: 4 if stats.tokens >= at else 1)
    assert [(change.old, change.new) for change in engine.control.changes] == [(0, 3), (3, 1), (1, 4)]
    assert all(change.reason for change in engine.control.changes)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_whatever_comes_each_text_is_that_of_its_own_levels(tuned, seed):
    """Requests that come, go and are cancelled while the level wanders: `generate` with the same raises gives the same text."""
    numbers, level = random.Random(seed), [0]
    engine = Engine(tuned, lambda stats: level[0], options(slots=6, chunk=24))
    ears, compared = [], 0
    for _ in range(100):
        if numbers.random() < 0.25:
            ears += ask(engine, [(prompts(1, 1, 50, seed=numbers.random())[0], numbers.randint(1, 25))])
        if numbers.random() < 0.15:
            level[0] = numbers.randint(0, 4)
        if ears and numbers.random() < 0.05:
            engine.cancel(numbers.choice(ears).request)
        engine.step()
    run(engine)
    for ear in ears:
        prompt, ((_, first), *raises) = ear.request.prompt, ear.request.levels or [(0, 0)]
        if any(at <= len(prompt) for at, _ in raises):  # while the prompt was read
            continue

        def policy(stats, first=first, raises=raises):
            return max([first, *(to for at, to in raises if stats.tokens >= at)])

        text = alone(tuned, prompt, ear.request.max_tokens, first, level_policy=policy)
        assert ear.tokens == text[: len(ear.tokens)] and ear.finish in ("length", "cancelled")
        assert ear.finish == "cancelled" or ear.tokens == text
        compared += bool(raises)
    assert compared >= 3 and len(engine.control.changes) > 5 and engine.finished["error"] == 0
    assert_empty(engine)


def test_trained_keys_are_not_folded(tiny_model):
    model = get_peft_model(
        tiny_model("llama"),
        DSLAConfig(task_type="CAUSAL_LM", window_size=8, level=0, trained_projections=["q_proj", "k_proj", "v_proj", "o_proj"]),
    ).eval()
    level = [0]
    engine = Engine(model, lambda stats: level[0], SMALL)
    (old,) = ask(engine, [([5, 6, 7], 9)])
    engine.step(), engine.step()
    level[0] = 2
    (new,) = ask(engine, [([5, 6], 9)])
    run(engine)
    assert old.request.levels == [(3, 0)] and new.request.levels == [(2, 2)]


def test_a_request_that_does_not_fit_raises_the_level_of_an_empty_engine(tuned):
    engine = Engine(tuned, Load(), options(kv_bytes=4 * 40 * 128))  # 40 tokens of all four layers
    assert engine.memory.pool.num_blocks == 40
    (ear,) = ask(engine, [(prompts(1, 60, 60)[0], 4)])
    run(engine)
    assert ear.finish == "length" and ear.request.level == 2 and "memory" in engine.control.changes[-1].reason
    with pytest.raises(ValueError, match="blocks of memory"):
        Engine(tuned, 0, options(kv_bytes=4 * 40 * 128)).submit([5] * 60, 4, Ear())


def test_a_policy_that_fails_leaves_the_level(tuned, caplog):
    engine = Engine(tuned, 0, SMALL)
    engine.control.policy, engine.control.highest = lambda stats: 1 / 0, 4
    (ear,) = ask(engine, [([5, 6], 4)])
    run(engine)
    assert ear.tokens == alone(tuned, [5, 6], 4, 0) and caplog.text.count("the policy failed") == 1


def test_a_fold_without_memory_reads_the_text_again(tuned, monkeypatch):
    level = [0]
    engine = Engine(tuned, lambda stats: level[0], SMALL)
    (ear,) = ask(engine, [([5, 6, 7], 9)])
    for _ in range(4):
        engine.step()
    level[0] = 2
    core = engine.levels.cores[0]
    monkeypatch.setattr(type(core), "fold", lambda *args, **options: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory")))
    run(engine)
    assert ear.finish == "length" and len(ear.tokens) == 9 and engine.control.level == 2
    assert_empty(engine)


@pytest.mark.parametrize("share, tokens", [(1.0, 4), (0.5, 7), (0.25, 19)])
def test_prompts_take_their_share_of_the_time(tuned, monkeypatch, share, tokens):
    """Pieces of one second, tokens of half a second: how many tokens a running text gets while four pieces are read."""
    clock = Clock()
    engine = Engine(tuned, 0, options(prompt_share=share, prompt_patience=1e9), clock=clock)

    def taking(seconds, call):
        def timed(*args):
            clock.now += seconds
            return call(*args)

        return timed

    monkeypatch.setattr(engine.runner, "prefill", taking(1.0, engine.runner.prefill))
    monkeypatch.setattr(engine.runner, "decode", taking(0.5, engine.runner.decode))
    running, late = ask(engine, [([5, 6], 100), ([5] * 32, 1)])
    engine.step()
    while not late.request.tokens:
        engine.step()
    # Two tokens in the step that read the first prompt; the last piece of the second is followed by a token.
    assert len(running.request.tokens) - 2 == tokens
    assert late.request.tokens == alone(tuned, [5] * 32, 1, 0)


def test_a_prompt_that_has_waited_long_is_read_with_every_token(tuned, monkeypatch):
    clock = Clock()
    engine = Engine(tuned, 0, options(prompt_share=0.01, prompt_patience=10.0), clock=clock)
    read = engine.runner.prefill

    def timed(*args):
        clock.now += 1.0
        return read(*args)

    monkeypatch.setattr(engine.runner, "prefill", timed)
    running, late = ask(engine, [([5, 6], 100), ([5] * 48, 1)])
    engine.step()
    for _ in range(5):
        engine.step()
    assert late.request.cached == 8  # a piece, and nothing since
    clock.now = 10.0
    for _ in range(3):
        engine.step()
    assert late.request.cached == 8 + 3 * 8


def test_pieces_end_with_whole_windows(tuned):
    """All but the last of a text, if a chunk has room for a window."""
    engine = Engine(tuned, 2, options(chunk=20))
    assert engine.levels.window == 8
    ears = ask(engine, [([5] * 50, 2), ([6] * 11, 2)])
    read = []
    for _ in range(4):
        before = [ear.request.cached for ear in ears]
        engine.step()
        read.append([ear.request.cached - b for ear, b in zip(ears, before, strict=True)])
    assert read == [[16, 0], [16, 0], [18 + 1, 0], [0, 11 + 1]]  # a piece, or with the last one a token
    run(engine)
    assert ears[0].tokens == alone(tuned, [5] * 50, 2, 2) and ears[1].tokens == alone(tuned, [6] * 11, 2, 2)


def test_listeners_are_told_while_the_next_token_is_computed(tuned, monkeypatch):
    """In order, and none is kept back when nothing more is computed."""
    engine = Engine(tuned, 0, SMALL)
    heard = []
    decode = engine.runner.decode
    monkeypatch.setattr(engine.runner, "decode", lambda *args: (heard.append("computes"), decode(*args))[1])
    engine.submit([5, 6], 3, lambda event: heard.append("token" if event.token is not None else event.finish))
    engine.step()
    assert heard == ["computes", "token"] and engine.busy
    engine.step()
    assert heard == ["computes", "token", "computes", "token", "token", "length"] and not engine.busy
    engine.submit([5, 6], 1, lambda event: heard.append("token" if event.token is not None else event.finish))
    engine.step()
    assert heard[-2:] == ["token", "length"] and not engine.busy


# --- recorded steps ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernels", [False, True])
def test_recorded_steps_give_the_same_texts(tuned, monkeypatch, request, kernels):
    """With the kernels a step reads keys and values in their blocks, and one recording serves texts of every length."""
    monkeypatch.setattr("dsla_hf.inference.recorder.SMALLEST_SHOWN", 8)
    if kernels:
        request.getfixturevalue("interpreted_kernels")
    level = [0]
    engine = Engine(tuned, lambda stats: level[0], SMALL, record=PlainRecording)
    # The interpreter takes half a second a step: fewer texts, and shorter ones.
    wanted = [(prompt, 6 + (1 if kernels else 5) * i) for i, prompt in enumerate(prompts(5 if kernels else 6, 1, 8))]
    ears = ask(engine, wanted)
    for _ in range(6 if kernels else 9):
        engine.step()
    level[0] = 2
    run(engine)
    monkeypatch.setattr("dsla_kernels.dispatch.choice", "auto")
    for (prompt, tokens), ear in zip(wanted, ears, strict=True):
        (_, first), *raises = ear.request.levels
        if all(at > len(prompt) for at, _ in raises):

            def policy(stats, first=first, raises=raises):
                return max([first, *(to for at, to in raises if stats.tokens >= at)])

            assert ear.tokens == alone(tuned, prompt, tokens, first, level_policy=policy)
    steps, pieces = recorded(engine)
    assert bool(pieces) == kernels
    assert {key[0] for key in steps} == {0, 2} and {key[1] for key in steps} <= {1, 2, 4}
    assert ({key[2] for key in steps} == {0}) if kernels else len({key[2] for key in steps}) > 1
    assert_empty(engine)


def test_prepared_steps_are_there_when_a_text_comes(tuned, monkeypatch):
    monkeypatch.setattr("dsla_hf.inference.recorder.SMALLEST_SHOWN", 64)
    engine = Engine(tuned, 2, SMALL, record=PlainRecording)
    engine.prepare([0, 1, 2])
    steps, pieces = recorded(engine)
    assert {key[:2] for key in steps} == {(level, rows) for level in (0, 1, 2) for rows in (1, 2, 4)} and not pieces
    assert_empty(engine)
    wanted = [(prompt, 6) for prompt in prompts(4, 1, 8)]
    ears = ask(engine, wanted)
    run(engine)
    assert [ear.tokens for ear in ears] == [alone(tuned, prompt, tokens, 2) for prompt, tokens in wanted]
    assert recorded(engine) == (steps, {})
    calls = engine.snapshot()["calls"]
    assert calls["replayed"] > 9 and calls["plain"] == 0
    metrics = generate_latest(Metrics(engine, "m").registry).decode()
    assert f'dsla_recordable_calls_total{{how="replayed"}} {calls["replayed"]}.0' in metrics


@pytest.mark.parametrize("chunk, places", [(8, {"first", "behind windows"}), (6, {"first", "behind windows", "anywhere"})])
def test_recorded_pieces_read_prompts_of_any_length_anywhere(tuned, in_blocks, watched_recording, monkeypatch, chunk, places):
    """Windows have 8 tokens. Pieces full and padded, behind others, and in slots that have had another text; some texts run."""
    monkeypatch.setattr("dsla_hf.serving.engine.graphs.SMALLEST_PIECE", 1)
    monkeypatch.setattr("dsla_hf.serving.engine.graphs.FINE_PIECES", 4)
    engine = Engine(tuned, 2, options(chunk=chunk, snapshot_bytes=0), record=watched_recording)
    engine.prepare([2])
    _, pieces = recorded(engine)
    sizes = [size for size in (1, 2, 4, 5, 6, 7, 8) if size <= chunk]
    assert sorted(pieces) == [(2, size, place) for size in sizes for place in ("behind windows", "first")]
    wanted = [(prompt, 3) for prompt in prompts(9, 1, 30, seed=3)] + [([7] * length, 2) for length in (1, 2, 3, 8, 9, 16)]
    ears = ask(engine, wanted)
    run(engine)
    _, now = recorded(engine)
    assert {key: now[key] for key in pieces} == pieces
    assert {place for _, _, place in now} == places
    assert [ear.tokens for ear in ears] == [alone(tuned, prompt, tokens, 2) for prompt, tokens in wanted]
    assert_empty(engine)


def test_a_piece_can_be_recorded_while_texts_run(tuned, in_blocks, monkeypatch):
    """The call before the recording reads no token and changes nothing, neither where a text begins nor where it goes on."""
    monkeypatch.setattr("dsla_hf.serving.engine.graphs.SMALLEST_PIECE", 4)
    engine = Engine(tuned, 4, options(chunk=4), record=PlainRecording)
    read = engine.runner.prefill

    def read_anew(request, tokens):
        engine.runner.recorder.drop(lambda key: isinstance(key[2], str))
        return read(request, tokens)

    monkeypatch.setattr(engine.runner, "prefill", read_anew)
    wanted = [(prompt, 5) for prompt in prompts(5, 5, 24, seed=4)]
    ears = ask(engine, wanted)
    run(engine)
    assert [ear.tokens for ear in ears] == [alone(tuned, prompt, tokens, 4) for prompt, tokens in wanted]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_graphs_serve_texts_that_come_go_and_are_raised(tiny_model, adapter_model):
    model = adapter_model(tiny_model("llama", hidden_size=64, head_dim=16), level=0).cuda()
    engine = Engine(model, lambda stats: 2 if stats.tokens >= 60 else 0, options(block_size=16, chunk=96), record=CudaRecording)
    engine.prepare([0, 2])
    steps, pieces = recorded(engine)
    assert {key[:2] for key in pieces} == {(level, size) for level in (0, 2) for size in (64, 96)} and steps
    wanted = [(prompt, 40) for prompt in prompts(7, 3, 50, seed=5)] + [(prompt, 5) for prompt in prompts(3, 97, 200)]
    ears = ask(engine, wanted)
    run(engine)
    assert recorded(engine) == (steps, pieces) and engine.runner.recorder.reason is None
    for (prompt, tokens), ear in zip(wanted, ears, strict=True):
        (_, first), *raises = ear.request.levels
        if all(at > len(prompt) for at, _ in raises):

            def policy(stats, first=first, raises=raises):
                return max([first, *(to for at, to in raises if stats.tokens >= at)])

            model.set_level(first)
            ids = torch.tensor([prompt], device="cuda")
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, level_policy=policy)
            assert ear.tokens == out[0, len(prompt) :].tolist()
    assert_empty(engine)


def test_texts_of_like_length_are_raised_together(tuned, monkeypatch):
    """Texts in mid-generation, one whose prompt is read in part and one that is not begun: few folds, and each text stays its own."""
    monkeypatch.setattr("dsla_hf.serving.engine.engine.FOLDED_AT_ONCE", 60)
    level, folds = [0], []
    engine = Engine(tuned, lambda stats: level[0], options(slots=8, chunk=20))
    fold = engine.memory.fold
    monkeypatch.setattr(engine.memory, "fold", lambda slots, tokens, *levels: (folds.append(tokens), fold(slots, tokens, *levels)))
    wanted = [(prompt, 9) for prompt in [*prompts(5, 4, 14), [7] * 60, [8] * 9]]
    ears = ask(engine, wanted)
    for _ in range(4):
        engine.step()
    cached = sorted((ear.request.cached for ear in ears), reverse=True)
    level[0] = 4
    engine.step()
    assert cached[0] > 20 and cached[-1] == 0 and [count for tokens in folds for count in tokens] == cached
    assert 2 <= len(folds) <= 4 and all(len(tokens) * max(tokens) <= 60 for tokens in folds)
    run(engine)
    for (prompt, tokens), ear in zip(wanted[:5], ears, strict=False):
        _, (at, to) = ear.request.levels
        assert ear.tokens == alone(tuned, prompt, tokens, 0, level_policy=lambda stats, at=at, to=to: to if stats.tokens >= at else 0)
    assert_empty(engine)


def test_folds_are_rehearsed_with_nobodys_block(tuned):
    Engine(tuned, 0, options(max_level=0)).memory.rehearse_folds()  # nothing to do
    engine = Engine(tuned, lambda stats: 2 if stats.tokens >= 9 else 0, SMALL)
    engine.memory.rehearse_folds()
    assert_empty(engine)
    (ear,) = ask(engine, [([5, 6, 7], 12)])
    run(engine)
    assert ear.tokens == alone(tuned, [5, 6, 7], 12, 0, level_policy=lambda stats: 2 if stats.tokens >= 9 else 0)


def test_folds_that_are_rehearsed_are_such_as_come(tuned, monkeypatch, caplog):
    """Several texts together, or a long one that the pool can hold; without memory for it the server begins all the same."""
    engine = Engine(tuned, "load", options(kv_bytes=4 * 100 * 128))  # a hundred blocks
    folded, fold = [], engine.memory._fold
    monkeypatch.setattr("dsla_hf.serving.engine.slots.FOLDED_AT_ONCE", 130)

    def watched(layers, slots, tokens):
        if len(tokens) == 1 and tokens[0] > 150:
            raise torch.OutOfMemoryError("CUDA out of memory")
        folded.append(tokens)
        fold(layers, slots, tokens)

    monkeypatch.setattr(engine.memory, "_fold", watched)
    engine.memory.rehearse_folds()
    assert folded == [[4 * blocks] for blocks in (1, 2, 3, 16, 17, 31, 32)] and "fold of a long text" in caplog.text
    folded.clear()
    monkeypatch.setattr(engine.memory, "_fold", lambda layers, slots, tokens: folded.append(tokens))
    engine.memory.rehearse_folds()
    assert [max(tokens) for tokens in folded if len(tokens) == 1][-1] == 4 * 64
    assert [tokens for tokens in folded if len(tokens) > 1] == [[4 * n] * 2 for n in (1, 2, 3, 16)] + [[4 * n] * 3 for n in (1, 2, 3)]


@pytest.mark.parametrize(
    "policy, change, expected",
    [
        (2, {}, [2]),
        ("load", {}, [0, 1, 2, 3]),
        (Load(step=2, max_level="100%"), {}, [0, 2, 4]),
        (Load(step=2, max_level="100%"), {"max_level": 3}, [0, 2, 3]),
        (lambda stats: 0, {}, [0, 1, 2, 3, 4]),
        (lambda stats: 0, {"max_level": 2}, [0, 1, 2]),
    ],
)
def test_levels_that_are_expected(tuned, policy, change, expected):
    assert Engine(tuned, policy, options(**change)).expected_levels() == expected


def test_recordings_that_find_no_memory_are_left_out(tuned, in_blocks, caplog):
    """What is recorded goes on being used, and texts are right."""
    made = []

    def record(step, pool):
        if len(made) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        made.append(PlainRecording(step))
        return made[-1]

    engine = Engine(tuned, 2, SMALL, record=record)
    engine.prepare()
    assert len(engine.runner.recorder.recordings) == 3
    wanted = [(prompt, 4) for prompt in prompts(4, 1, 20)]
    ears = ask(engine, wanted)
    run(engine)
    assert [ear.tokens for ear in ears] == [alone(tuned, prompt, tokens, 2) for prompt, tokens in wanted]
    said = [record.message for record in caplog.records if "record" in record.message]
    assert len(made) == 3 and len(said) == 1 and "--kv-gib" in said[0]


def test_sizes_of_pieces():
    assert piece_sizes(2048) == [64, 128, 256, 512, 640, 768, 896, 1024, 1280, 1536, 1792, 2048]
    assert piece_sizes(700) == [64, 128, 256, 512, 640, 700] and piece_sizes(16) == [16]


def test_steps_that_cannot_be_recorded_run_as_they_are(tuned, caplog):
    def refuse(step, pool):
        raise RuntimeError("no graphs here")

    engine = Engine(tuned, 1, SMALL, record=refuse)
    (ear,) = ask(engine, [([5, 6], 9)])
    run(engine)
    assert ear.tokens == alone(tuned, [5, 6], 9, 1) and caplog.text.count("cannot be recorded") == 1


# --- limits and faults ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, words",
    [({"prompt_share": 0.0}, "prompt_share"), ({"prompt_share": 1.5}, "prompt_share"), ({"prompt_patience": -1.0}, "prompt_patience")],
)
def test_wrong_shares(change, words):
    with pytest.raises(ValueError, match=words):
        options(**change)


@pytest.mark.parametrize(
    "prompt, tokens, words", [([], 3, "empty"), ([5], 0, "max_tokens"), ([97], 3, "0 to 96"), ([-1], 3, "0 to 96"), ([5] * 250, 7, "256")]
)
def test_requests_that_can_never_be_served_are_refused(tuned, prompt, tokens, words):
    with pytest.raises(ValueError, match=words):
        Engine(tuned, 0, SMALL).submit(prompt, tokens, Ear())


def test_a_full_queue_and_a_draining_engine_refuse(tuned):
    engine = Engine(tuned, 0, options(max_waiting=2))
    ears = ask(engine, [([5], 2)] * 2)
    with pytest.raises(QueueFull, match="2 requests"):
        engine.submit([5], 2, Ear())
    engine.drain()
    with pytest.raises(Draining):
        engine.submit([5], 2, Ear())
    run(engine)
    assert all(ear.finish == "length" for ear in ears)


def test_an_error_in_a_step_ends_its_batch_and_nothing_else(tuned, monkeypatch):
    engine = Engine(tuned, 1, SMALL)
    ears = ask(engine, [([5, 6], 9), ([7, 8], 9)])
    engine.step()
    (waiting,) = ask(engine, [([3, 4], 5)])
    decode = engine.runner.decode

    def fail(*args):
        monkeypatch.setattr(engine.runner, "decode", decode)
        raise RuntimeError("broken")

    monkeypatch.setattr(engine.runner, "decode", fail)
    engine.step()
    assert [str(ear.error) for ear in ears] == ["broken", "broken"]
    run(engine)
    assert waiting.error is not None or waiting.tokens == alone(tuned, [3, 4], 5, 1)
    (after,) = ask(engine, [([3, 4], 5)])
    run(engine)
    assert after.tokens == alone(tuned, [3, 4], 5, 1)
    assert_empty(engine)


def test_chunks_grow_again_after_a_lack_of_memory(tuned, monkeypatch):
    clock = Clock()
    engine = Engine(tuned, 0, options(chunk=64), clock=clock)
    real, failures = engine.runner.prefill, [2]

    def fail_twice(*args):
        if failures[0]:
            failures[0] -= 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*args)

    monkeypatch.setattr(engine.runner, "prefill", fail_twice)
    ask(engine, [([5, 6], 3)] * 3)
    run(engine)
    assert engine.chunk == 16
    for wait, chunk in ((59, 16), (1, 32), (59, 32), (1, 64), (1000, 64)):
        clock.now += wait
        engine.step()
        assert engine.chunk == chunk


def test_a_recent_mean_forgets():
    times = RecentMean(10.0, most=3)
    assert times.mean(0) is None
    for when, value in ((0, 1.0), (5, 2.0), (6, 6.0)):
        times.add(when, value)
    assert times.mean(10) == 3.0
    assert times.mean(11) == 4.0  # the first is older than ten seconds
    times.add(11, 1.0)
    times.add(11, 2.0)
    assert times.mean(11) == 3.0  # of the last three
    assert times.mean(22) is None


@pytest.mark.parametrize("call", ["prefill", "decode"])
def test_without_memory_the_newest_is_shed_and_the_level_rises(tuned, monkeypatch, call):
    engine = Engine(tuned, Load(cool_down=1e6), options(chunk=64))
    engine.control.changed = engine.clock()
    wanted = [([5, 6], 9), ([7, 8], 9)]
    ears = ask(engine, wanted)
    real = getattr(engine.runner, call)
    calls = [0]

    def fail_at_the_second(*args):
        logits = real(*args)  # the states have been written already
        calls[0] += 1
        if calls[0] == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return logits

    monkeypatch.setattr(engine.runner, call, fail_at_the_second)
    run(engine)
    assert isinstance(ears[1].error, ShedForMemory) and engine.chunk == 32
    assert engine.control.level == 1 and engine.control.changes[-1].reason == "out of memory"
    assert ears[0].finish == "length" and len(ears[0].tokens) == 9
    assert_empty(engine)


def test_an_error_outside_the_model_ends_all_requests_and_not_the_server(tuned, monkeypatch):
    engine = Engine(tuned, 1, SMALL)
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_admit", lambda: 1 / 0)
        engine.start()
        (ear,) = ask(engine, [([5, 6], 9)])
        assert ear.done.wait(10) and isinstance(ear.error, ZeroDivisionError)
    (ear,) = ask(engine, [([5, 6], 9)])
    assert ear.done.wait(10) and ear.finish == "length"
    engine.stop()


@pytest.mark.parametrize("sampling", [Sampling(1e-300, seed=1), Sampling(1.0, top_p=1e-300, seed=1), Sampling(0.0, top_p=0.5)])
def test_the_smallest_temperature_and_top_p_take_the_likeliest(tuned, sampling):
    engine = Engine(tuned, 1, SMALL)
    ear = Ear()
    engine.submit([5, 6], 9, ear, sampling)
    run(engine)
    assert ear.tokens == alone(tuned, [5, 6], 9, 1)


def test_a_listener_that_fails_ends_its_request_alone(tuned):
    engine = Engine(tuned, 1, SMALL)

    def deaf(event):
        raise OSError("gone")

    engine.submit([5, 6], 9, deaf)
    (ear,) = ask(engine, [([7, 8], 9)])
    run(engine)
    assert ear.tokens == alone(tuned, [7, 8], 9, 1) and engine.finished["cancelled"] == 1
    assert_empty(engine)


def test_two_hundred_requests_with_cancellations_in_a_thread(tuned):
    """Each answer is that of `generate` alone, nothing leaks, none is lost without an error."""
    different = prompts(12, 1, 60)
    wanted = [(different[i % 12], 2 + 3 * (i % 7)) for i in range(200)]
    engine = Engine(tuned, 2, options(slots=16, chunk=128))
    engine.start()
    ears = ask(engine, wanted)
    for ear in ears[5::10]:
        while not (ear.tokens or ear.done.is_set()):
            ear.done.wait(0.001)
        engine.cancel(ear.request)
    assert all(ear.done.wait(60) for ear in ears)
    engine.stop()
    texts = {tuple(prompt): alone(tuned, prompt, 20, 2) for prompt in different}
    for (prompt, tokens), ear in zip(wanted, ears, strict=True):
        assert ear.finish in ("length", "cancelled")
        assert ear.tokens == texts[tuple(prompt)][: len(ear.tokens)] and (ear.finish == "cancelled" or len(ear.tokens) == tokens)
    assert 0 < engine.finished["cancelled"] <= 20 and sum(engine.finished.values()) == 200
    assert_empty(engine)


def test_times_of_another_level_or_beside_an_old_cohort_are_no_measure(tuned):
    asked = [2]
    engine = Engine(tuned, lambda stats: asked[0], SMALL)

    def measured():
        return engine.token_times.mean(engine.clock()), engine.first_tokens.mean(engine.clock())

    (old,) = ask(engine, [(prompts(5)[0], 20)])
    while len(old.tokens) < 6:
        engine.step()
    assert None not in measured()
    asked[0] = 0
    (young,) = ask(engine, [(prompts(7)[0], 40)])
    engine.step()
    assert measured() == (None, None) and engine.old_level == 2
    while not old.finish:
        engine.step()
    assert measured()[0] is None and measured()[1] is not None and len(young.tokens) > 3
    run(engine)
    assert young.finish == "length" and measured()[0] is not None
