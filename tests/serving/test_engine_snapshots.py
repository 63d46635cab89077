"""Prefix reuse above level 0: texts go on from snapshots of states, are what they are without, and never mix models or levels."""

import random

import pytest
import torch
from engine_texts import SMALL, Ear, alone, ask, assert_empty, held_bytes, options, prompts, recorded, run

from dsla_hf import DSLAConfig
from dsla_hf.inference.sampling import Sampling
from dsla_hf.serving.engine.engine import Engine, physical_memory
from dsla_hf.serving.engine.snapshots import Snapshot, Snapshots

PREFIX = prompts(1, 32, 32, seed=7)[0]  # whole blocks of 4, whole windows and chunks of 8
TAILS = prompts(5, 3, 12, seed=8)
FOLLOWED = [PREFIX + tail for tail in TAILS]


@pytest.fixture
def tuned(tiny_model, adapter_model):
    return adapter_model(tiny_model("llama"))


@pytest.fixture
def heads(head_model):
    return head_model().requires_grad_(False)


@pytest.fixture(params=["layers", "heads"])
def either(request, tuned, heads):
    """Levels that count layers, or KV heads."""
    return tuned if request.param == "layers" else heads


def kept(engine):
    return list(engine.reuse.snapshots._by_name.values())


def serve(engine, prompt, tokens, level=None):
    """One request, alone."""
    ear = Ear()
    ear.request = engine.submit(prompt, tokens, ear, level=level)
    run(engine)
    assert ear.error is None
    return ear


def logits_of(engine):
    """What prompts that an engine reads from now on end with."""
    prefill, seen = engine.runner.prefill, []
    engine.runner.prefill = lambda request, tokens: seen.append(prefill(request, tokens)) or seen[-1]
    return seen


# --- texts are what they are without reuse --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text", "gpt_oss", "mixtral"])
@pytest.mark.parametrize("level", [2, 4])
def test_texts_with_a_shared_beginning_read_it_once(tiny_model, adapter_model, kind, level):
    model = adapter_model(tiny_model(kind))
    engine, without = Engine(model, level, SMALL), Engine(model, level, options(prefix_reuse=False))
    ears, others = (ask(one, [(prompt, 8) for prompt in FOLLOWED]) for one in (engine, without))
    run(engine)
    run(without)
    assert [ear.tokens for ear in ears] == [ear.tokens for ear in others]
    assert [ear.request.reused >= len(PREFIX) for ear in ears] == [False] + [True] * 4
    assert engine.prefix_hits == sum(ear.request.reused for ear in ears) and engine.prefix_queries == sum(map(len, FOLLOWED))
    assert engine.read_tokens == without.read_tokens - engine.prefix_hits
    assert engine.reuse.hits == {"blocks": 0, "snapshot": 4, "lower": 0} and without.reuse.snapshots.taken == 0
    assert_empty(engine)
    assert_empty(without)


@pytest.mark.parametrize("level", [1, 3, 5, 8])
def test_of_heads_too(heads, level):
    engine = Engine(heads, level, SMALL)
    ears = ask(engine, [(prompt, 8) for prompt in FOLLOWED])
    run(engine)
    assert [ear.tokens for ear in ears] == [alone(heads, prompt, 8, level) for prompt in FOLLOWED]
    assert [ear.request.reused for ear in ears] == [0] + [len(PREFIX)] * 4
    assert_empty(engine)


@pytest.mark.parametrize("level", [2, 4])
def test_the_same_bits_where_pieces_have_the_same_bounds(either, level):
    prompt, logits = PREFIX + TAILS[0], []
    for reuse in (True, False):
        engine = Engine(either, level, options(prefix_reuse=reuse))
        seen = logits_of(engine)
        for last in (PREFIX + [3], prompt):
            ear = serve(engine, last, 5)
        assert ear.request.reused == (len(PREFIX) if reuse else 0)
        logits.append(seen[-1])
    assert torch.equal(*logits)


@pytest.mark.parametrize("answer", range(1, 12))
def test_a_chat_goes_on_from_an_answer_of_any_length(either, answer):
    engine = Engine(either, 3, SMALL)
    first = serve(engine, PREFIX + TAILS[1], answer)
    second = first.request.text + [9, 8, 7]
    ear = serve(engine, second, 6)
    assert ear.request.reused == len(second) - 4, "what is new, and the last token of the answer, which was never read"
    assert ear.tokens == alone(either, second, 6, 3)
    third = serve(engine, ear.request.text + [5] * 30, 6)
    assert third.request.reused == len(ear.request.text) - 1 and third.tokens == alone(either, third.request.prompt, 6, 3)
    assert_empty(engine)


def test_what_begins_within_a_window_is_read_up_to_its_end_first(tuned):
    engine = Engine(tuned, 2, SMALL)
    first = serve(engine, PREFIX, 4)  # 35 tokens are read
    pieces, prefill = [], engine.runner.prefill
    engine.runner.prefill = lambda request, tokens: pieces.append((request.cached, tokens)) or prefill(request, tokens)
    ear = serve(engine, first.request.text + [5] * 20, 6)
    assert pieces == [(35, 5), (40, 8), (48, 8)] and ear.tokens == alone(tuned, ear.request.prompt, 6, 2)


def test_texts_that_part_where_nothing_was_kept(tuned):
    """The second reads all of it and leaves states where they part, at a whole window; from the third on it is read from there."""
    engine = Engine(tuned, 2, options(chunk=64))
    prefix = PREFIX[:22]  # five whole blocks, two whole windows
    texts = [prefix + tail for tail in ([3] * 30, [4] * 30, [5] * 30, [6] * 3)]
    ears = [serve(engine, text, 6) for text in texts]
    assert [ear.request.reused for ear in ears] == [0, 0, 16, 16]
    assert [ear.tokens for ear in ears] == [alone(tuned, text, 6, 2) for text in texts]
    assert [snapshot.tokens for snapshot in kept(engine)] == [52, 57, 52, 57, 52, 57, 16, 25, 30], "and where prompts and texts ended"
    assert_empty(engine)


def test_texts_that_wait_show_where_they_part(tuned):
    """A tree: two beginnings that one begins alike."""
    texts = [PREFIX[:16] + middle + [end] * 9 for middle in ([3] * 16, [4] * 16) for end in (5, 6, 7)]
    engine = Engine(tuned, 2, options(chunk=64))
    ears = ask(engine, [(text, 6) for text in texts])
    run(engine)
    assert [ear.request.reused for ear in ears] == [0, 32, 32, 16, 32, 32]
    assert [ear.tokens for ear in ears] == [alone(tuned, text, 6, 2) for text in texts]
    assert_empty(engine)


def test_a_prompt_goes_on_in_another_way_than_it_was_answered(either):
    """A template that leaves out what was thought, or a tokenizer that cuts the answer otherwise: its prompt is not read again."""
    engine = Engine(either, 2, SMALL)
    prompt = PREFIX[:27]
    first = serve(engine, prompt, 6)
    second = [*prompt, (first.tokens[0] + 1) % 97, 8, 7]
    ear = serve(engine, second, 6)
    assert ear.request.reused == len(prompt) and ear.tokens == alone(either, second, 6, 2)
    assert_empty(engine)


def test_the_same_prompt_again(tuned):
    """The first leaves states where its last piece begins, the second where its last whole window ends."""
    engine, reused, text = Engine(tuned, 2, options(chunk=16)), [], PREFIX + [4] * 13
    for _ in range(3):
        ear = serve(engine, text, 6)
        reused.append(ear.request.reused)
        assert ear.tokens == alone(tuned, text, 6, 2)
    assert reused == [0, 32, 40]


def test_many_texts_in_any_order(either):
    """Texts that begin alike, of all levels, with answers that others go on from, some given up: each is what it is alone."""
    numbers = random.Random(3)
    engine = Engine(either, lambda stats: 0, options(slots=3, chunk=16, snapshot_bytes=120_000))
    engine.pinnable = tuple(level for level in engine.levels.ladder)
    ears, starts = [], [PREFIX[:length] for length in (5, 17, 32)]
    for _ in range(60):
        text = numbers.choice(starts) + prompts(1, 1, 20, seed=numbers.random())[0]
        ear = Ear()
        ear.request = engine.submit(text, numbers.randint(1, 12), ear, level=numbers.choice((0, 1, 3, 4)))
        ears.append(ear)
        for _ in range(numbers.randint(0, 9)):
            engine.step()
        if numbers.random() < 0.1:
            engine.cancel(numbers.choice(ears).request)
        done = [ear.request.text for ear in ears if ear.finish]
        if done:
            starts[numbers.randrange(3)] = numbers.choice(done)[:120]
    run(engine)
    for ear in ears:
        text = alone(either, ear.request.prompt, ear.request.max_tokens, ear.request.level)
        assert ear.tokens == (text[: len(ear.tokens)] if ear.finish == "cancelled" else text)
    assert engine.reuse.hits["snapshot"] > 5 and engine.reuse.hits["blocks"] > 5 and engine.reuse.snapshots.evicted > 0
    assert_empty(engine)


def test_recorded_pieces_begin_within_windows(tuned, in_blocks, watched_recording, monkeypatch):
    monkeypatch.setattr("dsla_hf.serving.engine.graphs.SMALLEST_PIECE", 4)
    engine = Engine(tuned, 2, options(chunk=32), record=watched_recording)
    engine.prepare([2])
    _, pieces = recorded(engine)
    assert {key for key in pieces if key[2] == "anywhere"} == {(2, 4, "anywhere"), (2, 8, "anywhere")}
    text = PREFIX
    for _ in range(4):
        ear = serve(engine, text, 5)
        assert ear.tokens == alone(tuned, text, 5, 2)
        text = ear.request.text + [4] * 21
    assert ear.request.reused == len(ear.request.prompt) - 22, "all but what is new"
    assert recorded(engine)[1] == pieces, "nothing was recorded while texts waited"


def test_at_level_0_no_piece_begins_anywhere(tuned, in_blocks, watched_recording):
    engine = Engine(tuned, 0, options(chunk=32), record=watched_recording)
    engine.prepare([0])
    _, pieces = recorded(engine)
    for text in (PREFIX[:20] + [3], PREFIX):  # five blocks are no whole windows of 8
        ear = serve(engine, text, 5)
        assert ear.tokens == alone(tuned, text, 5, 0)
    assert ear.request.reused == 20 and recorded(engine)[1] == pieces


def test_a_hybrid(tuned):
    tuned.set_level(2)
    hybrid = tuned.merge_and_unload().eval()
    engine = Engine(hybrid, "load", SMALL)
    first = serve(engine, PREFIX, 6)
    text = first.request.text + [3, 4]
    ear = serve(engine, text, 6)
    assert ear.tokens == alone(hybrid, text, 6) and ear.request.reused == len(text) - 3


# --- never of another model or level ----------------------------------------------------------------------------------


@pytest.mark.parametrize("lower", [False, True])
def test_not_of_another_adapter(tuned, lower, seed):
    """Two adapters of a model, of the same layers: the second begins nothing with what the first has read, and the first still can."""
    config = {"task_type": "CAUSAL_LM", "conversion_order": [2, 0, 3, 1], "window_size": 8}
    tuned.add_adapter("other", DSLAConfig(**config))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "dsla_" in name and "other" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    engine = Engine(tuned, 2, options(lower_prefixes=lower))
    texts, reused = {}, []
    for name in ("default", "other", "default", "other"):
        tuned.set_adapter(name)
        ear = serve(engine, FOLLOWED[0], 8)
        assert ear.tokens == alone(tuned, FOLLOWED[0], 8, 2)
        reused.append(ear.request.reused > 0)
        texts[name] = ear.tokens
    assert reused == [False, False, True, True] and texts["default"] != texts["other"]
    known = {engine.levels.identity()}
    tuned.base_model.set_conversion_order([1, 3, 0, 2])  # a level is other layers now
    known.add(engine.levels.identity())
    with tuned.disable_adapter():
        known.add(engine.levels.identity())
    assert len(known) == 3


def test_not_of_another_model(tiny_model, adapter_model):
    engines = [Engine(adapter_model(tiny_model("llama")), 2, SMALL) for _ in range(2)]
    assert len({engine.levels.identity() for engine in engines}) == 2
    requests = [serve(engine, FOLLOWED[0], 4).request for engine in engines]
    assert not set(requests[0].keys) & set(requests[1].keys) and not any(request.reused for request in requests)


def test_not_of_weights_that_are_gone(tuned):
    engine = Engine(tuned, 2, SMALL)
    serve(engine, FOLLOWED[0], 8)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "dsla_" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    request = engine.submit(FOLLOWED[0], 8, Ear())
    with pytest.raises(RuntimeError, match="let them end before forget_prefixes"):
        engine.forget_prefixes()
    engine.cancel(request)
    run(engine)
    engine.forget_prefixes()
    assert_empty(engine)
    ear = serve(engine, FOLLOWED[0], 8)
    assert ear.request.reused == 0 and ear.tokens == alone(tuned, FOLLOWED[0], 8, 2)


@pytest.mark.parametrize("after", [1, 3, 5])
def test_a_raise_in_mid_prompt(either, after):
    """Of a text that begins with a snapshot and one that has not begun to read: they equal those without reuse, and mislead nobody."""
    texts = []
    for reuse in (True, False):
        level = [1]
        engine = Engine(either, lambda stats, level=level: level[0], options(prefix_reuse=reuse))
        ears = ask(engine, [(PREFIX + [3], 2)])
        run(engine)
        ears += ask(engine, [(PREFIX + [5] * 60, 8), (PREFIX + [6] * 60, 8)])
        cached = ears[1].request
        for _ in range(after + (0 if reuse else 4)):
            engine.step()
        assert len(PREFIX) < cached.cached < len(cached.prompt)
        level[0] = 3
        run(engine)
        assert cached.level == ears[2].request.level == 3
        ears += ask(engine, [(PREFIX + [5] * 60, 8), (PREFIX + [6] * 60, 8)])
        run(engine)
        assert [ear.tokens for ear in ears[3:]] == [alone(either, ear.request.prompt, 8, 3) for ear in ears[3:]]
        assert not reuse or [ear.request.reused for ear in ears[3:]] == [len(PREFIX), len(PREFIX + [6] * 56)]
        assert_empty(engine)
        texts.append([ear.tokens for ear in ears])
    assert texts[0] == texts[1]


# --- what was read at lower levels, where that is asked for -----------------------------------------------------------


@pytest.mark.parametrize("levels", [(0, 2), (0, 4), (1, 3), (3, 4)])
def test_a_lower_prefix_equals_a_live_raise(either, levels):
    low, high = levels
    prompt, level = PREFIX + TAILS[0], [low]
    reuses = Engine(either, lambda stats: level[0], options(lower_prefixes=True))
    serve(reuses, PREFIX + [3], 3)
    level[0] = high
    reuses.step()
    seen = logits_of(reuses)
    ears = [serve(reuses, prompt, 8), serve(reuses, prompt, 8)]
    assert [ear.request.reused for ear in ears] == [len(PREFIX)] * 2 and reuses.reuse.hits["lower"] == 2
    assert ears[0].request.history == ((0, low), (len(PREFIX), high))

    raised = Engine(either, lambda stats: level[0], options(prefix_reuse=False))
    level[0] = low
    ear = Ear()
    ear.request = raised.submit(prompt, 8, ear)
    for _ in range(4):
        raised.step()
    assert ear.request.cached == len(PREFIX)
    level[0] = high
    live = logits_of(raised)
    run(raised)
    assert [other.tokens for other in ears] == [ear.tokens] * 2 and ear.request.history == ears[0].request.history
    assert all(torch.equal(one, live[-1]) for one in (seen[0], seen[-1]))
    assert_empty(reuses)


def test_a_chat_goes_on_from_a_text_that_was_raised(either):
    """In its answer: the blocks that its kept heads have are found, and so are its states."""
    for lower in (True, False):
        level = [0]
        engine = Engine(either, lambda stats, level=level: level[0], options(lower_prefixes=lower))
        ear = Ear()
        ear.request = first = engine.submit(PREFIX, 12, ear)
        while len(first.tokens) < 5:
            engine.step()
        cached, level[0] = first.cached, 3
        run(engine)
        assert first.history == ((0, 0), (cached, 3)) and cached % SMALL.block_size == 0
        second = serve(engine, first.text + [9, 8, 7], 6)
        assert second.request.reused == (len(first.text) - 1 if lower else 0)
        third = serve(engine, second.request.text + [5], 6)
        assert third.request.reused == len(second.request.text) - 1
        assert third.request.history == (first.history if lower else ((0, 3),))
        level[0] = 4
        engine.step()
        fourth = serve(engine, third.request.text + [5], 6)
        assert fourth.request.reused == (len(third.request.text) - 1 if lower else 0)
        if not lower:
            assert fourth.tokens == alone(either, fourth.request.prompt, 6, 4)
        assert_empty(engine)


def test_lower_prefixes_need_exact_folds(tiny_model, adapter_model):
    model = adapter_model(tiny_model("llama"), trained_projections=["q_proj", "k_proj", "o_proj"])
    with pytest.raises(ValueError, match="lower_prefixes True folds keys and values, which"):
        Engine(model, 2, options(lower_prefixes=True))
    assert serve(engine := Engine(model, 2, SMALL), FOLLOWED[0], 4).request.reused == 0
    assert serve(engine, FOLLOWED[1], 4).request.reused == len(PREFIX)


def test_lower_prefixes_need_room(tuned):
    """Copies of blocks for what is folded: without room for them a text is read whole."""
    level = [0]
    engine = Engine(tuned, lambda stats: level[0], SMALL)
    room = engine.memory.blocks_for(len(PREFIX) + 20, 0) * engine.bytes_per_block
    engine = Engine(tuned, lambda stats: level[0], options(kv_bytes=room, snapshot_bytes=2**17, lower_prefixes=True))
    serve(engine, PREFIX + [3], 3)
    level[0] = 2
    engine.step()
    ear = serve(engine, PREFIX + [4], 8)
    assert ear.request.reused == 0 and ear.tokens == alone(tuned, PREFIX + [4], 8, 2)
    assert_empty(engine)


# --- memory -----------------------------------------------------------------------------------------------------------


def test_snapshots_have_a_budget(either):
    engine = Engine(either, 3, SMALL)
    engine = Engine(either, 3, options(snapshot_bytes=2 * engine.memory.snapshot_bytes(3)))
    first, *others = (serve(engine, text, 4) for text in prompts(4, 20, 20, seed=9))
    snapshots = engine.reuse.snapshots
    assert snapshots.evicted == snapshots.taken - len(kept(engine)) > 0
    assert [snapshot.tokens for snapshot in kept(engine)] == [20, 23], "those of the last"
    assert serve(engine, [*others[-1].request.text, 3], 4).request.reused == 23
    assert serve(engine, [*first.request.text, 3], 4).request.reused == 0
    assert_empty(engine)


def test_those_used_least_recently_go_first():
    store, empty = Snapshots(10), torch.zeros(0)

    def add(tokens, size=3):
        store.add(size, lambda: Snapshot(b"a", tuple(range(tokens)), tokens, ((0, 1),), 1, [], empty, empty, size))

    for tokens in (1, 2, 3):
        add(tokens)
    assert store.has(b"a", (0,), ((0, 1),), 1) and not store.has(b"a", (0,), ((0, 2),), 2) and not store.has(b"b", (0,), ((0, 1),), 1)
    add(4)
    text = [9, 0, 1, 2, 3]
    assert [snapshot.tokens for snapshot in store.behind(b"a", text[1:], 0, 4)] == [4, 3, 1] and store.used == 9
    assert [snapshot.tokens for snapshot in store.behind(b"a", text[1:], 0, 3)] == [3, 1] and not store.behind(b"a", text, 0, 5)
    store.used_now(store.behind(b"a", text[1:], 0, 3)[0])
    add(5, size=7)
    assert [snapshot.tokens for snapshot in store._by_name.values()] == [3, 5] and store.used == 10
    assert store.figures() == {"kept": 2, "bytes": 10, "budget": 10, "taken": 5, "evicted": 3}
    store.clear()
    assert store.used == len(store) == 0 and not store.behind(b"a", text[1:], 0, 4)


def test_the_largest_snapshot_is_as_large_as_said(either):
    engine = Engine(either, lambda stats: 0, SMALL)
    engine.pinnable = tuple(engine.levels.ladder)
    for level in engine.levels.ladder[1:]:
        serve(engine, PREFIX[:17], 3, level=level)  # 19 tokens are read: all but one of a block
        assert kept(engine)[-1].level == level
        assert held_bytes(kept(engine)[-1]) == kept(engine)[-1].size == engine.memory.snapshot_bytes(level)


@pytest.mark.parametrize(
    "changes, error",
    [
        ({"snapshot_bytes": 100}, "snapshot_bytes 100 hold no snapshot, which takes"),
        ({"snapshot_bytes": -1}, "snapshot_bytes must be 0 or more, got -1"),
        ({"snapshot_bytes": 2**70}, f"snapshot_bytes {2**70} are more than the {physical_memory()} bytes"),
        ({"snapshot_bytes": 2**20, "prefix_reuse": False}, "snapshot_bytes 1048576 is for prefix_reuse"),
        ({"snapshot_bytes": 2**20, "batch_invariant": True}, "snapshot_bytes 1048576 is for prefix_reuse"),
        ({"lower_prefixes": True, "prefix_reuse": False}, "lower_prefixes True is for prefix_reuse"),
    ],
)
def test_a_budget_that_does_not_fit_is_refused(tuned, changes, error):
    with pytest.raises(ValueError, match=error.replace("*", r"\*")):
        Engine(tuned, 2, options(**changes))


def test_at_level_0_alone_a_budget_is_refused(tiny_model):
    with pytest.raises(ValueError, match="snapshot_bytes 1048576 are of no use: this engine runs at level 0 alone"):
        Engine(tiny_model("llama"), 0, options(snapshot_bytes=2**20))


def test_little_memory_for_keys_and_values_leaves_none_for_snapshots(tuned, caplog):
    caplog.set_level("INFO")
    small = Engine(tuned, 2, SMALL).memory.snapshot_bytes(2) * 4
    engine = Engine(tuned, 2, options(kv_bytes=small))
    assert engine.reuse.snapshots.budget == 0 and "texts above level 0 are read whole" in caplog.text
    for _ in range(2):
        assert serve(engine, PREFIX, 4).request.reused == 0
    assert_empty(engine)


def test_snapshots_whose_blocks_are_evicted_go_too(tuned):
    engine = Engine(tuned, 2, SMALL)
    room = engine.memory.blocks_for(len(PREFIX) + 16, 2) * engine.bytes_per_block
    engine = Engine(tuned, 2, options(kv_bytes=room, snapshot_bytes=2**20))
    for prompt in (PREFIX, prompts(1, 40, 40, seed=9)[0], PREFIX):
        ear = serve(engine, prompt, 7)
        assert ear.tokens == alone(tuned, prompt, 7, 2) and ear.request.reused == 0
        assert_empty(engine)


def test_a_lack_of_memory_drops_them(tuned, monkeypatch):
    engine = Engine(tuned, 2, SMALL)
    serve(engine, PREFIX, 4)
    assert len(engine.reuse.snapshots)

    def fails(*given):
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(engine.memory, "copy_states", fails)
        ear = serve(engine, FOLLOWED[0], 6)
    assert ear.tokens == alone(tuned, FOLLOWED[0], 6, 2) and not len(engine.reuse.snapshots)
    assert_empty(engine)
    serve(engine, PREFIX, 4)
    ears = ask(engine, [(prompt, 30) for prompt in FOLLOWED[:2]])
    for _ in range(9):
        engine.step()
    engine._failed([ear.request for ear in ears], torch.OutOfMemoryError("out of memory"))
    assert not len(engine.reuse.snapshots)
    run(engine)
    assert ears[0].tokens == alone(tuned, FOLLOWED[0], 30, 2)
    assert_empty(engine)


def test_lost_and_failed_requests_leave_nothing_wrong(either):
    engine = Engine(either, 2, SMALL)
    ears = ask(engine, [(prompt, 30) for prompt in FOLLOWED[:3]])
    for _ in range(7):
        engine.step()
    engine.cancel(ears[0].request)
    engine.step()
    decode, before = engine.runner.decode, engine.reuse.snapshots.taken

    def fails(*given):
        raise ValueError("broken")

    engine.runner.decode = fails
    run(engine)
    assert ears[1].error is not None and engine.reuse.snapshots.taken == before
    assert_empty(engine)
    engine.runner.decode = decode
    ear = serve(engine, FOLLOWED[3], 6)
    assert ear.request.reused >= len(PREFIX) and ear.tokens == alone(either, FOLLOWED[3], 6, 2)
    assert_empty(engine)


def test_scored_prompts_are_read_whole(tuned):
    engine = Engine(tuned, 2, SMALL)
    for _ in range(2):
        ear = Ear()
        request = engine.submit(PREFIX, 2, ear, Sampling(prompt_logprobs=1))
        run(engine)
        assert request.reused == 0 and engine.prefix_queries == 0
    assert serve(engine, PREFIX, 2).request.reused == 24


@pytest.mark.parametrize("level", [0, 2])
def test_blocks_that_are_shared_are_not_needed_twice(tuned, level):
    """Memory for three texts lets more run that begin alike."""
    model_blocks = Engine(tuned, level, SMALL).memory
    room = 3 * model_blocks.blocks_for(len(PREFIX) + 16, level)
    size = Engine(tuned, level, SMALL).bytes_per_block
    engine = Engine(tuned, level, options(slots=8, kv_bytes=room * size, snapshot_bytes=2**18 if level else None))
    serve(engine, PREFIX + [3], 2)
    ears = ask(engine, [(PREFIX + [number], 16) for number in range(4, 12)])
    most = 0
    while engine.busy:
        engine.step()
        most = max(most, len(engine.scheduler.running))
    assert most > 5
    assert [ear.tokens for ear in ears] == [alone(tuned, ear.request.prompt, 16, level) for ear in ears]
    assert_empty(engine)


def test_queries_are_counted_once_however_long_a_piece_waits(tuned):
    """A chunk whose rest holds no window leaves the second text for the next step."""
    engine = Engine(tuned, 2, options(chunk=12))
    ears = ask(engine, [(PREFIX[:20], 3), (prompts(1, 30, 30, seed=4)[0], 3)])
    run(engine)
    assert engine.prefix_queries == 50 and engine.prefix_hits == 0
    assert [ear.tokens for ear in ears] == [alone(tuned, ear.request.prompt, 3, 2) for ear in ears]
