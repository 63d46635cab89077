"""Prefix reuse: texts that begin alike are read once at level 0, each is what it is without reuse, and nothing leaks or mixes."""

import httpx
import openai
import pytest
import torch
from engine_texts import SMALL, Ear, alone, ask, assert_empty, options, prompts, run
from server import byte_tokenizer, served

from dsla_hf.inference.sampling import Sampling
from dsla_hf.serving.engine.engine import Engine, EngineOptions, ShedForMemory
from dsla_hf.serving.engine.prefixes import extend_keys
from dsla_hf.serving.http.api import ApiOptions, build_app

PREFIX = prompts(1, 32, 32, seed=7)[0]  # whole blocks of 4, whole chunks of 8
TAILS = prompts(5, 1, 12, seed=8)
FOLLOWED = [PREFIX + tail for tail in TAILS]


@pytest.fixture
def tuned(tiny_model, adapter_model):
    return adapter_model(tiny_model("llama"))


def hits(engine):
    return engine.prefix_hits


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text", "gpt_oss", "mixtral"])
def test_texts_with_a_shared_beginning_read_it_once(tiny_model, adapter_model, kind):
    model = adapter_model(tiny_model(kind))
    engine, without = Engine(model, 0, SMALL), Engine(model, 0, options(prefix_reuse=False))
    ears, others = (ask(one, [(prompt, 8) for prompt in FOLLOWED]) for one in (engine, without))
    run(engine)
    run(without)
    assert [ear.tokens for ear in ears] == [ear.tokens for ear in others]
    assert [ear.request.reused >= len(PREFIX) for ear in ears] == [False] + [True] * 4
    assert hits(engine) == sum(ear.request.reused for ear in ears) and engine.prefix_queries == sum(map(len, FOLLOWED))
    assert engine.read_tokens == without.read_tokens - hits(engine)
    assert without.prefix_hits == without.prefix_queries == 0
    assert_empty(engine)
    assert_empty(without)


def test_the_same_bits_where_pieces_have_the_same_bounds(tuned):
    prompt = PREFIX + TAILS[0][:5]
    logits = []
    for reuse in (True, False):
        engine = Engine(tuned, 0, options(prefix_reuse=reuse))
        prefill, seen = engine.runner.prefill, []
        engine.runner.prefill = lambda request, tokens, prefill=prefill, seen=seen: seen.append(prefill(request, tokens)) or seen[-1]
        for last in (PREFIX + [3], prompt):
            ask(engine, [(last, 1)])
            run(engine)
        assert hits(engine) == (len(PREFIX) if reuse else 0)
        logits.append(seen[-1])
    assert torch.equal(*logits)


def test_a_text_is_read_from_its_last_token_at_least(tuned):
    engine = Engine(tuned, 0, SMALL)
    for _ in range(2):
        (ear,) = ask(engine, [(PREFIX, 6)])
        run(engine)
        assert ear.tokens == alone(tuned, PREFIX, 6, 0)
    assert ear.request.reused == len(PREFIX) - SMALL.block_size


def test_a_chat_goes_on_from_its_answer(tuned):
    engine = Engine(tuned, 0, SMALL)
    (first,) = ask(engine, [(PREFIX, 13)])
    run(engine)
    second = PREFIX + first.tokens + [9, 8, 7]
    (ear,) = ask(engine, [(second, 6)])
    run(engine)
    assert ear.request.reused == 44  # 32 and 13 tokens, the last of which is never cached, in whole blocks of 4
    assert ear.tokens == alone(tuned, second, 6, 0)
    assert_empty(engine)


@pytest.mark.parametrize("budget", [None, 0])
def test_no_other_level_finds_what_one_has_left(tuned, budget):
    level = [0]
    engine = Engine(tuned, lambda stats: level[0], options(snapshot_bytes=budget))
    again = budget is None  # at the levels above 0
    for now, reused in ((0, 0), (2, 0), (3, 0), (0, 1), (2, again), (3, again), (0, 1), (4, 0)):
        level[0] = now
        engine.step()
        (ear,) = ask(engine, [(FOLLOWED[0], 6)])
        run(engine)
        assert ear.request.level == now and (ear.request.reused > 0) == bool(reused)
        assert ear.tokens == alone(tuned, FOLLOWED[0], 6, now)
    assert_empty(engine)


@pytest.mark.parametrize("after", [1, 3, 5])
def test_a_raise_in_mid_prompt(tuned, after):
    """The prefix is shared, then the text that shares it is raised: it equals one without reuse, and later ones are not misled."""
    texts = []
    for reuse in (True, False):
        level = [0]
        engine = Engine(tuned, lambda stats, level=level: level[0], options(prefix_reuse=reuse, chunk=8))
        ears = ask(engine, [(PREFIX, 2)])
        run(engine)
        ears += ask(engine, [(PREFIX[:24] + [5] * 60, 8), (PREFIX[:24] + [6] * 60, 8)])
        # Without reuse the same tokens are cached when the level rises.
        cached = ears[1].request
        for _ in range(after + (0 if reuse else 3)):
            engine.step()
        assert 24 < cached.cached < len(cached.prompt)
        level[0] = 2
        run(engine)
        assert cached.level == 2
        level[0] = 0
        engine.step()
        ears += ask(engine, [(PREFIX[:24] + [5] * 60, 8), (PREFIX, 4)])
        run(engine)
        assert ears[3].tokens == alone(tuned, ears[3].request.prompt, 8, 0) and ears[4].tokens == alone(tuned, PREFIX, 4, 0)
        assert_empty(engine)
        texts.append([ear.tokens for ear in ears])
    assert texts[0] == texts[1]


def test_a_raise_leaves_a_text_that_keeps_level_0_as_it_is(tuned):
    level = [0]
    engine = Engine(tuned, lambda stats: level[0], SMALL)
    pinned, follows = Ear(), Ear()
    engine.submit(FOLLOWED[0], 20, pinned, level=0)
    engine.submit(FOLLOWED[1], 20, follows)
    for _ in range(9):
        engine.step()
    assert hits(engine) == len(PREFIX)
    level[0] = 2
    engine.step()
    late = ask(engine, [(FOLLOWED[2], 6)])[0]
    run(engine)
    assert pinned.tokens == alone(tuned, FOLLOWED[0], 20, 0) and late.tokens == alone(tuned, FOLLOWED[2], 6, 2)
    assert late.request.reused == 0
    assert_empty(engine)


def test_blocks_that_are_left_make_room(tuned):
    """A pool that holds one text at a time: what is left is evicted, its end before its beginning."""
    engine = Engine(tuned, 0, SMALL)
    room = engine.memory.blocks_for(len(PREFIX) + 16, 0) * engine.bytes_per_block
    engine = Engine(tuned, 0, options(kv_bytes=room))
    for prompt in (PREFIX, prompts(1, 20, 20, seed=9)[0], PREFIX):
        (ear,) = ask(engine, [(prompt, 12)])
        run(engine)
        assert ear.tokens == alone(tuned, prompt, 12, 0)
        assert_empty(engine)
    assert 0 < ear.request.reused < len(PREFIX) - SMALL.block_size


def test_lost_and_failed_requests_leave_nothing_behind(tuned):
    engine = Engine(tuned, 0, SMALL)
    ears = ask(engine, [(prompt, 30) for prompt in FOLLOWED[:3]])
    for _ in range(7):
        engine.step()
    engine.cancel(ears[0].request)
    engine.step()
    decode, calls = engine.runner.decode, []

    def fails(*given):
        calls.append(given)
        raise ValueError("broken")

    engine.runner.decode = fails
    run(engine)
    assert calls and ears[1].error is not None
    assert_empty(engine)
    engine.runner.decode = decode
    (ear,) = ask(engine, [(FOLLOWED[3], 6)])
    run(engine)
    assert ear.request.reused >= len(PREFIX) and ear.tokens == alone(tuned, FOLLOWED[3], 6, 0)
    assert_empty(engine)


def test_texts_that_begin_anew_write_into_blocks_of_their_own(tuned):
    """Memory runs out in a step of two texts that share: the older is read again, at a higher level."""
    engine = Engine(tuned, "load", SMALL)
    pinned, older, newest = Ear(), Ear(), Ear()
    engine.submit(FOLLOWED[0], 30, pinned, level=0)
    engine.submit(FOLLOWED[1], 30, older)
    engine.submit(FOLLOWED[2], 30, newest)
    while not (older.tokens and newest.tokens):
        engine.step()
    assert hits(engine) >= 2 * len(PREFIX)

    shared = set(engine.memory.pool._owned[0][2]) & set(engine.memory.pool._owned[1][2])
    assert shared
    follow = [text for text in engine.scheduler.running if text.pinned is None]
    engine._failed(follow, torch.OutOfMemoryError("out of memory"))
    assert follow[0].level > 0 and not shared & set(engine.memory.pool._owned[1][2])
    run(engine)
    assert isinstance(newest.error, ShedForMemory) and older.finish == "length"
    assert pinned.tokens == alone(tuned, FOLLOWED[0], 30, 0)
    assert_empty(engine)


def test_scored_prompts_are_read_whole(tuned):
    engine = Engine(tuned, 0, SMALL)
    for _ in range(2):
        ear = Ear()
        request = engine.submit(PREFIX, 2, ear, Sampling(prompt_logprobs=1))
        run(engine)
        assert request.reused == 0
    assert ask(engine, [(PREFIX, 2)])[0].request.reused == 0
    run(engine)
    assert hits(engine) > 0


def test_a_key_stands_for_all_that_comes_before():
    keys, other, longer = [], [], []
    extend_keys(keys, [1, 2, 3, 4, 5], 2)
    extend_keys(other, [9, 2, 3, 4], 2)
    assert len(keys) == 2 and not set(keys) & set(other)
    extend_keys(longer, [1, 2, 3], 2)
    extend_keys(longer, [1, 2, 3, 4, 5, 6], 2)
    assert longer[:2] == keys and len(longer) == 3


def test_not_with_batch_invariant(tuned):
    with pytest.raises(ValueError, match="prefix_reuse True is not for batch_invariant"):
        EngineOptions(batch_invariant=True, prefix_reuse=True)
    assert not Engine(tuned, 0, options(batch_invariant=True, max_tokens=64)).reuses


@pytest.mark.parametrize("level", [0, 2])
def test_two_turns_over_http(tuned, level):
    engine = Engine(tuned, level, EngineOptions(slots=2, block_size=8, chunk=64, max_tokens=512))
    with served(build_app(engine, byte_tokenizer(), ApiOptions("tiny"))) as (_, address):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)

        def chat(messages):
            return client.chat.completions.create(model="tiny", messages=messages, max_tokens=9, temperature=0)

        messages = [{"role": "system", "content": "You answer in one word. " * 4}, {"role": "user", "content": "Hello"}]
        first = chat(messages)
        answer = {"role": "assistant", "content": first.choices[0].message.content}
        second = chat([*messages, answer, {"role": "user", "content": "And now?"}])
        figures = httpx.get(f"{address}/metrics").text
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert first.usage.prompt_tokens - 16 < cached < second.usage.prompt_tokens
    assert f'dsla_reused_prefixes_total{{what="{"snapshot" if level else "blocks"}"}} 1.0' in figures
    said = dict(line.rsplit(" ", 1) for line in figures.splitlines() if line.startswith("dsla_snapshot"))
    assert {name: int(float(value)) for name, value in said.items() if not name.endswith("_created")} == {
        "dsla_snapshots": len(engine.reuse.snapshots),
        "dsla_snapshot_bytes": engine.reuse.snapshots.used,
        "dsla_snapshot_budget_bytes": engine.reuse.snapshots.budget,
        "dsla_snapshots_taken_total": engine.reuse.snapshots.taken,
        "dsla_snapshots_evicted_total": 0,
    }
    assert bool(engine.reuse.snapshots.used) == bool(level)
    asked = first.usage.prompt_tokens + second.usage.prompt_tokens
    assert f'vllm:prefix_cache_queries_total{{model_name="tiny"}} {float(asked)}' in figures
    assert f'vllm:prefix_cache_hits_total{{model_name="tiny"}} {float(cached)}' in figures
    assert_empty(engine)
