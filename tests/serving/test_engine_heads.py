"""The engine at levels that count KV heads: each text is that of `generate`, and what a raise frees is there for newcomers."""

import logging
import random

import pytest
import torch
from engine_texts import SMALL, Ear, alone, ask, assert_empty, check_served, options, prompts, recorded, run
from head_layers import ORDER
from peft import get_peft_model

from dsla_hf import CacheMemory, DSLAConfig, FixedLevel, Load, PromptLength
from dsla_hf.inference.recorder import CudaRecording, PlainRecording
from dsla_hf.serving.engine import levels as engine_levels
from dsla_hf.serving.engine.engine import Engine
from dsla_hf.serving.engine.levels import Levels
from dsla_hf.serving.engine.pool import BlockPool, OutOfBlocks


@pytest.fixture
def heads(head_model):
    """Factory of models whose levels count heads; nothing is trained, as in a server."""
    return lambda *args, **config: head_model(*args, **config).requires_grad_(False)


def level_policy(raises):
    """As `generate` counts: a raise of the engine came before the forward that makes token `at`."""
    first, *later = raises
    return lambda stats: max([first[1], *(to for at, to in later if stats.tokens >= at)])


# --- the ladder -------------------------------------------------------------------------------------------------


def test_a_ladder_of_few_equal_rungs(heads, monkeypatch):
    levels = Levels(heads())
    assert levels.ladder == [*range(9)] and levels.columns == 1
    assert levels.groups == [[tuple(head)] for head in ORDER], "with few heads each is a rung"
    monkeypatch.setattr(engine_levels, "MOST_RUNGS", 3)
    levels.cut(8)
    assert levels.ladder == [0, 2, 5, 8] and [len(group) for group in levels.groups] == [2, 3, 3]
    assert levels.columns == 3 and levels.rung(5) == 2
    levels.cut(5)
    assert levels.ladder == [0, 1, 3, 5] and levels.columns == 2
    assert sorted(head for group in levels.groups for head in group) == [(layer, head) for layer in range(4) for head in range(2)]
    assert [len(group) for group in levels.groups] == [1, 2, 2, 2, 1], "heads above the limit have blocks of the same size"
    levels.cut(0)
    assert levels.ladder == [0] and all(len(group) <= 3 for group in levels.groups)
    assert levels.converted(4) == {2: (0,), 0: (1,), 3: (0, 1)}
    assert levels.note(5) == " (3 of 8 KV heads kept)"


def test_a_ladder_for_a_large_model():
    """As of 32 layers with 32 heads: sixteen rungs of 64."""
    levels = Levels.__new__(Levels)
    levels.unit, levels.num_layers, levels.kv_heads, levels.lowest = "head", 32, 32, 0
    levels.order = [(layer, head) for head in range(32) for layer in range(32)]
    levels.highest = 1024
    levels.cut(1024)
    assert levels.ladder == [*range(0, 1025, 64)] and levels.columns == 64 and len(levels.groups) == 16
    levels.cut(922)
    assert levels.ladder[-1] == 922 and len(levels.ladder) == 17 and len(levels.groups) == 18
    assert {b - a for a, b in zip(levels.ladder[:-1], levels.ladder[1:], strict=True)} == {57, 58}


def test_layers_are_rungs_as_ever(tuned_layers):
    levels = Levels(tuned_layers)
    assert levels.ladder == [0, 1, 2, 3, 4] and levels.columns == 2
    assert levels.groups == [[(layer, 0), (layer, 1)] for layer in (2, 0, 3, 1)]
    levels.cut(1)
    assert levels.ladder == [0, 1, 2, 3, 4], "a limit changes nothing"


@pytest.fixture
def tuned_layers(tiny_model, adapter_model):
    return adapter_model(tiny_model("llama"))


# --- texts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [2, 5])  # of ORDER's eight heads: layers with one converted, both, or none
def test_texts_are_those_of_generate_alone(heads, level):
    model = heads()
    wanted = [(prompt, 3 + 5 * i % 11) for i, prompt in enumerate(prompts(6))]
    engine = Engine(model, level, SMALL)
    ears = ask(engine, wanted)
    run(engine)
    for (prompt, tokens), ear in zip(wanted, ears, strict=True):
        assert ear.tokens == alone(model, prompt, tokens, level)
        assert ear.request.levels == [(len(prompt), level)]
    assert engine.tokens_at_level[level] == sum(tokens for _, tokens in wanted)
    assert_empty(engine)


@pytest.mark.parametrize(
    "kind, base, config",
    [
        ("qwen3", {"num_attention_heads": 8, "num_key_value_heads": 8}, {"conversion_order": [[1, 3], [1, 0], [2, 7], [1, 6], [2, 1]]}),
        ("gemma2", {}, {}),
        ("phi3", {}, {}),
        ("gpt_oss", {}, {}),
        ("llama", {}, {"window_size": 0}),
        ("llama", {}, {"trained_projections": ["q_proj", "k_proj", "v_proj", "o_proj"]}),
    ],
    ids=["eight heads in two layers", "gemma2", "phi3", "gpt_oss", "without window", "trained keys"],
)
def test_other_models_and_plans(heads, kind, base, config):
    model = heads(kind, base, **config)
    engine = Engine(model, 4, SMALL)
    check_served(engine, model, prompts(4, longest=30), 8, 4)
    assert_empty(engine)


def test_a_hybrid_of_heads(heads):
    model = heads()
    model.set_level(5)
    hybrid = model.merge_and_unload().eval()
    engine = Engine(hybrid, "load", SMALL)
    assert engine.levels.ladder == [5] and engine.control.level == 5 and engine.levels.unit == "head"
    assert sum(len(group) for group in engine.levels.groups) == 3
    check_served(engine, hybrid, prompts(5), 6)
    assert_empty(engine)


def test_a_hybrid_that_keeps_no_head(heads):
    model = heads()
    model.set_level(8)
    hybrid = model.merge_and_unload().eval()
    engine = Engine(hybrid, "load", SMALL)
    check_served(engine, hybrid, [[5, 6, 7]], 6)


@pytest.mark.parametrize("rungs", [16, 3])
def test_raises_in_mid_text_are_those_of_generate(heads, monkeypatch, rungs):
    """From softmax to some heads of a layer, from some to more, and to all; with rungs of one head, and of several in several layers."""
    monkeypatch.setattr(engine_levels, "MOST_RUNGS", rungs)
    model, level = heads(), [0]
    engine = Engine(model, lambda stats: level[0], options(chunk=64))
    wanted = [(prompt, 24) for prompt in prompts(3, 4, 12)]
    ears = ask(engine, wanted)
    free = [engine.memory.pool.free_blocks]
    for step, to in ((4, 2), (8, 5), (12, 8)):
        while len(ears[0].tokens) < step:
            engine.step()
        level[0], before = to, engine.memory.pool.free_blocks
        engine.step()
        assert engine.memory.pool.free_blocks > before, "what has gone over gives back its blocks"
        free.append(engine.memory.pool.free_blocks)
    assert free[-1] == engine.memory.pool.num_blocks, "nothing is kept"
    run(engine)
    for (prompt, tokens), ear in zip(wanted, ears, strict=True):
        raises = ear.request.levels
        assert [to for _, to in raises] == [0, 2, 5, 8] and all(at > len(prompt) for at, _ in raises[1:])
        assert ear.tokens == alone(model, prompt, tokens, 0, level_policy=level_policy(raises))
    assert_empty(engine)


def test_a_fold_by_hand(heads):
    """The states that a raise from level 2 to 5 leaves are those that the layers' own folds make of the blocks, the others stay."""
    model, level = heads(), [2]
    engine = Engine(model, lambda stats: level[0], SMALL)
    (ear,) = ask(engine, [(prompts(1, 21, 21)[0], 9)])
    for _ in range(6):
        engine.step()
    slot, cached, memory = torch.tensor([ear.request.slot]), ear.request.cached, engine.memory
    before, after = memory.levels.converted(2), memory.levels.converted(5)
    assert before == {2: (0,), 0: (1,)} and after == {2: (0,), 0: (1,), 3: (0, 1), 1: (1,)}
    expected = {}
    for layer, new in after.items():
        if heads_of := [head for head in new if head not in before.get(layer, ())]:
            places = memory.pool.places([memory._at[layer, head] for head in heads_of])
            k, v = memory.pool.read(places, slot, cached)
            whole_k, whole_v = (torch.zeros(1, cached, 2, 8) for _ in range(2))
            whole_k[:, :, heads_of], whole_v[:, :, heads_of] = k, v
            expected[layer] = heads_of, memory.levels.cores[layer].fold(whole_k, whole_v)  # of all heads: heads know nothing of one another
    kept = memory._states_of(2, (0,)).at(slot).of_heads(torch.tensor([memory._held[2].index(0)]))
    level[0] = 5
    engine._change_level(*engine._wanted_level())
    for layer, (heads_of, state) in expected.items():
        found = memory._states_of(layer, tuple(heads_of)).at(slot).of_heads(torch.tensor([memory._held[layer].index(h) for h in heads_of]))
        torch.testing.assert_close(found.recurrent, state.recurrent[:, heads_of])
        torch.testing.assert_close(found.window_k, state.window_k[:, :, heads_of])
        assert found.lengths == cached
    again = memory._states_of(2, (0,)).at(slot).of_heads(torch.tensor([memory._held[2].index(0)]))
    assert all(torch.equal(x, y) for x, y in zip(kept, again, strict=True))


def test_what_a_raise_frees_serves_a_newcomer(heads):
    """Three texts fill the memory; the fourth runs when heads have gone over, in blocks of theirs."""
    model, level = heads(), [0]
    block = 2 * 4 * 1 * 8 * 4  # bytes: keys and values of four tokens of a head
    engine = Engine(model, lambda stats: level[0], options(kv_bytes=3 * 8 * 8 * block, chunk=64))
    assert engine.memory.pool.num_blocks == 3 * 8 * 8  # three texts of 32 tokens, eight groups
    ears = ask(engine, [(prompt, 22) for prompt in prompts(3, 11, 11)])
    engine.step()
    assert engine.memory.pool.free_blocks == 0
    (late,) = ask(engine, [([9] * 11, 8)])
    for _ in range(4):
        engine.step()
    assert late.request.slot is None
    level[0] = 3
    engine.step()
    assert late.request.slot == 3 and late.request.level == 3
    run(engine)
    assert late.tokens == alone(model, [9] * 11, 8, 3)
    for ear in ears:
        assert ear.tokens == alone(model, ear.request.prompt, 22, 0, level_policy=level_policy(ear.request.levels))
    assert_empty(engine)


def test_a_lower_level_is_for_newcomers(heads):
    """Two cohorts run side by side, with other heads converted in the same layers."""
    model, level = heads(), [6]
    engine = Engine(model, lambda stats: level[0], SMALL)
    (old,) = ask(engine, [([5, 6, 7], 16)])
    for _ in range(3):
        engine.step()
    level[0] = 1
    (young,) = ask(engine, [([8, 9, 10], 24)])
    engine.step()
    assert engine.control.level == 1 and engine.old_level == 6
    run(engine)
    assert old.tokens == alone(model, [5, 6, 7], 16, 6)
    assert young.tokens == alone(model, [8, 9, 10], 24, 1)
    assert_empty(engine)


def test_a_pinned_text_keeps_its_level_beside_others_that_are_raised(heads, monkeypatch):
    monkeypatch.setattr(engine_levels, "MOST_RUNGS", 4)
    model, level = heads(), [2]
    engine = Engine(model, lambda stats: level[0], SMALL)
    assert engine.pinnable == (0, 2, 4, 6, 8)
    ears = [Ear() for _ in range(3)]
    pins = (0, 6, None)
    for ear, pinned in zip(ears, pins, strict=True):
        ear.request = engine.submit([8, 9, 10], 16, ear, level=pinned)
    for _ in range(5):
        engine.step()
    level[0] = 4
    run(engine)
    assert [ear.request.levels for ear in ears[:2]] == [[(3, 0)], [(3, 6)]] and [to for _, to in ears[2].request.levels] == [2, 4]
    for ear in ears:
        assert ear.tokens == alone(model, [8, 9, 10], 16, ear.request.levels[0][1], level_policy=level_policy(ear.request.levels))
    with pytest.raises(ValueError, match="level 5 cannot be kept: this server runs at 0, 2, 4, 6, 8"):
        engine.submit([8], 2, Ear(), level=5)
    assert_empty(engine)


def test_whatever_comes_each_text_is_that_of_its_own_levels(heads, monkeypatch):
    monkeypatch.setattr(engine_levels, "MOST_RUNGS", 4)
    numbers, level, model = random.Random(0), [0], heads()
    engine = Engine(model, lambda stats: level[0], options(slots=6, chunk=64))
    ears, compared = [], 0
    for _ in range(60):
        if numbers.random() < 0.25:
            ears += ask(engine, [(prompts(1, 1, 20, seed=numbers.random())[0], numbers.randint(1, 16))])
        if numbers.random() < 0.25:
            level[0] = numbers.randint(0, 8)
        if ears and numbers.random() < 0.05:
            engine.cancel(numbers.choice(ears).request)
        engine.step()
    run(engine)
    for ear in ears:
        raises = ear.request.levels
        if not raises or any(at <= len(ear.request.prompt) for at, _ in raises[1:]):
            continue
        assert {to for _, to in raises} <= {0, 2, 4, 6, 8}
        text = alone(model, ear.request.prompt, ear.request.max_tokens, raises[0][1], level_policy=level_policy(raises))
        assert ear.tokens == text[: len(ear.tokens)] and (ear.finish == "cancelled" or ear.tokens == text)
        compared += len(raises) > 1
    assert compared >= 2 and engine.finished["error"] == 0
    assert_empty(engine)


# --- recorded steps ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernels", [False, True])
def test_recorded_steps_give_the_same_texts(heads, monkeypatch, request, kernels):
    """With the kernels attention reads heads in their blocks, and a token goes into states of some heads of a layer in place."""
    monkeypatch.setattr("dsla_hf.inference.recorder.SMALLEST_SHOWN", 8)
    if kernels:
        request.getfixturevalue("interpreted_kernels")
    model, level = heads(base={"num_hidden_layers": 2}, conversion_order=[[1, 0], [0, 1], [1, 1], [0, 0]]), [1]
    engine = Engine(model, lambda stats: level[0], options(slots=2), record=PlainRecording)
    assert engine.runner.in_blocks == kernels
    wanted = [([5, 6, 7], 6), ([8, 9], 7)]
    ears = ask(engine, wanted)
    for _ in range(4):
        engine.step()
    level[0] = 3
    run(engine)
    monkeypatch.setattr("dsla_kernels.dispatch.choice", "auto")
    raised = 0
    for (prompt, tokens), ear in zip(wanted, ears, strict=True):
        raises = ear.request.levels
        if all(at > len(prompt) for at, _ in raises[1:]):
            assert ear.tokens == alone(model, prompt, tokens, raises[0][1], level_policy=level_policy(raises))
            raised += len(raises) > 1
    steps, pieces = recorded(engine)
    assert raised and {key[0] for key in steps} == {1, 3} and bool(pieces) == kernels
    assert_empty(engine)


def test_recorded_pieces_look_at_no_value(heads, watched_recording, monkeypatch):
    for name in ("can_attend_where_cached", "uses_triton"):
        monkeypatch.setattr(f"dsla_hf.serving.engine.runner.{name}", lambda *args: True)
    monkeypatch.setattr("dsla_hf.serving.engine.graphs.SMALLEST_PIECE", 4)
    model = heads()
    engine = Engine(model, 3, options(chunk=8), record=watched_recording)
    engine.prepare()
    _, pieces = recorded(engine)
    assert {key[0] for key in pieces} == {3}
    wanted = [(prompt, 3) for prompt in prompts(5, 1, 30, seed=3)]
    ears = ask(engine, wanted)
    run(engine)
    assert [ear.tokens for ear in ears] == [alone(model, prompt, tokens, 3) for prompt, tokens in wanted]
    assert_empty(engine)


def test_what_a_recording_reads_outlives_other_levels(heads):
    """A layer of an adapter may compose its weights for one level at a time: those of recorded levels stay where they are."""
    model = heads()
    engine = Engine(model, lambda stats: 0, SMALL, record=PlainRecording)
    engine.prepare([2, 5])
    model.set_level(2)
    made = {}
    for key, attentions in engine.runner._read_by.items():
        made.setdefault(key[0], {tuple(attention.split.converted) for attention in attentions})
    assert made == {2: {(0,), (1,)}, 5: {(0,), (1,)}} and engine.levels.attentions_in_part()
    assert {key[0] for key in recorded(engine)[0]} == {2, 5}


def test_folds_are_rehearsed_for_every_number_of_heads(heads, monkeypatch):
    engine = Engine(heads(), lambda stats: 0, SMALL)
    folded = []
    monkeypatch.setattr(engine.memory, "_fold", lambda some, slots, tokens: folded.append(some))
    engine.memory.rehearse_folds([0, 2, 4, 8])  # of layers 2 and 0 a head, of layer 3 two, of layers 1, 0 and 2 one or two
    assert {tuple(len(x) for x in some.values()) for some in folded} == {(1, 2)}
    monkeypatch.undo()
    engine.memory.rehearse_folds()
    assert_empty(engine)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_graphs_serve_texts_that_are_raised(heads):
    model = heads(base={"hidden_size": 64, "head_dim": 16}).cuda()
    engine = Engine(model, lambda stats: 5 if stats.tokens >= 60 else 2, options(block_size=16, chunk=96), record=CudaRecording)
    engine.prepare([2, 5])
    wanted = [(prompt, 40) for prompt in prompts(7, 3, 50, seed=5)]
    ears = ask(engine, wanted)
    run(engine)
    assert engine.runner.recorder.reason is None
    for (prompt, tokens), ear in zip(wanted, ears, strict=True):
        raises = ear.request.levels
        if all(at > len(prompt) for at, _ in raises[1:]):
            model.set_level(raises[0][1])
            ids = torch.tensor([prompt], device="cuda")
            options_of = {"max_new_tokens": tokens, "do_sample": False, "level_policy": level_policy(raises)}
            out = model.generate(ids, attention_mask=torch.ones_like(ids), **options_of)
            assert ear.tokens == out[0, len(prompt) :].tolist()
    assert_empty(engine)


# --- levels that users and policies name ------------------------------------------------------------------------


@pytest.mark.parametrize("policy, level", [("kept:25%", 6), ("kept:3", 5), ("50%", 4), (7, 7), (FixedLevel("kept:1"), 7)])
def test_a_fixed_level_is_served_as_it_is_named(heads, monkeypatch, policy, level):
    monkeypatch.setattr(engine_levels, "MOST_RUNGS", 2)
    engine = Engine(heads(), policy, SMALL)
    assert engine.control.level == level == engine.levels.ladder[-1]


def test_levels_between_two_rungs_are_rounded_and_said(heads, monkeypatch, caplog):
    """What is asked for converts no more than that; what memory needs converts enough."""
    monkeypatch.setattr(engine_levels, "MOST_RUNGS", 4)
    model = heads()
    engine = Engine(model, lambda stats: 5, SMALL)
    (ear,) = ask(engine, [([5, 6], 3)])
    run(engine)
    assert ear.request.level == 4 and caplog.text.count("is not among those in use") == 1
    engine = Engine(model, PromptLength(((0, 0), (4, "kept:40%"))), SMALL)
    (ear,) = ask(engine, [([5] * 6, 3)])
    run(engine)
    assert ear.request.level == 4, "five of eight, rounded down"
    engine = Engine(model, lambda stats: 0, SMALL)
    stats = engine.stats()
    budget = stats.__class__(**{**vars(stats), "rows": 1, "tokens": 200}).cache_bytes(3, 328)
    (ear,) = ask(engine, [([5] * 200, 1)])
    engine.control.policy = CacheMemory(budget)
    engine.step(), engine.step()
    assert engine.control.level == 4, "three would do, four is the next that there is"


def test_the_limit_is_the_last_rung(heads, monkeypatch):
    monkeypatch.setattr(engine_levels, "MOST_RUNGS", 3)
    engine = Engine(heads(), "load", options(max_level=7))
    assert engine.levels.ladder == [0, 2, 4, 7] and engine.control.highest == 7
    assert engine.expected_levels() == [0, 2, 4], "the policy goes to three quarters: six, rounded down"
    engine = Engine(heads(), Load(max_level="100%", step="50%"), options(max_level=7))
    assert engine.expected_levels() == [0, 4, 7], "half of the model's eight heads are two rungs"


def test_a_text_that_does_not_fit_is_refused_or_raises_the_level_to_a_rung_at_which_it_does(heads, monkeypatch):
    monkeypatch.setattr(engine_levels, "MOST_RUNGS", 4)
    block = 2 * 4 * 2 * 8 * 4  # four tokens of two heads
    model, small = heads(), options(kv_bytes=32 * block)
    engine = Engine(model, Load(), small)
    assert engine.memory.pool.num_blocks == 32 and engine.memory.blocks_for(64, 4) == 32
    assert [engine.memory.blocks_for(64, level) for level in (0, 2, 6, 8)] == [64, 48, 16, 0]
    (ear,) = ask(engine, [(prompts(1, 60, 60)[0], 4)])
    run(engine)
    assert ear.finish == "length" and ear.request.level == 4 and "memory" in engine.control.changes[-1].reason
    assert ear.tokens == alone(model, ear.request.prompt, 4, 4)
    with pytest.raises(ValueError, match="need 64 blocks of memory, there are 32"):
        Engine(model, 0, small).submit([5] * 60, 4, Ear())


def test_without_memory_the_level_rises_by_a_rung(heads, monkeypatch):
    monkeypatch.setattr(engine_levels, "MOST_RUNGS", 4)
    engine = Engine(heads(), Load(cool_down=1e6), options(chunk=64))
    engine.control.changed = engine.clock()
    ask(engine, [([5, 6], 9), ([7, 8], 9)])
    real, calls = engine.runner.decode, [0]

    def fail_once(*args):
        calls[0] += 1
        if calls[0] == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*args)

    monkeypatch.setattr(engine.runner, "decode", fail_once)
    run(engine)
    assert engine.control.level == 2 and engine.control.changes[-1].reason == "out of memory"
    assert_empty(engine)


def test_the_log_says_how_many_heads_are_kept(heads, caplog):
    with caplog.at_level(logging.INFO, logger="dsla_hf.serving"):
        Engine(heads(), 3, SMALL)
    assert "level 0 -> 3 (5 of 8 KV heads kept)" in caplog.text


# --- blocks -----------------------------------------------------------------------------------------------------


def test_blocks_of_groups_are_taken_and_given_back():
    pool = BlockPool(12, 4, num_groups=4, num_slots=2, max_tokens=16, columns=2, head_dim=8, dtype=torch.float32, device="cpu")
    pool.allocate(1, 9, 1)
    assert pool.free_blocks == 12 - 3 * 3 and not pool.tables[0].any() and not pool.tables[:, 0].any()
    assert sorted(pool.tables[1:, 1, :3].flatten().tolist()) == sorted(set(range(1, 13)) - set(pool._free))
    with pytest.raises(OutOfBlocks, match="4 blocks wanted, 3 of 12 are free"):
        pool.allocate(0, 4, 0)
    assert not pool.tables[:, 0].any()
    kept = pool.tables[3, 1].clone()
    pool.release(1, until=3)
    assert pool.free_blocks == 9 and not pool.tables[:3].any() and torch.equal(pool.tables[3, 1], kept)
    pool.release(1, until=2)
    assert pool.free_blocks == 9, "of what is gone already nothing is given back twice"
    pool.release(1), pool.release(1)
    assert sorted(pool._free) == list(range(1, 13)) and not pool.tables.any()
    pool.allocate(0, 16, 4)
    assert pool.free_blocks == 12


def test_blocks_of_a_long_text_of_a_large_model():
    """32k tokens in sixteen groups: each block once, in the tables of its slot alone."""
    sizes = {"num_groups": 16, "num_slots": 2, "max_tokens": 32_768, "columns": 1, "head_dim": 1}
    pool = BlockPool(16 * 512, 64, **sizes, dtype=torch.float32, device="cpu")
    pool.allocate(1, 32_768, 0)
    assert pool.free_blocks == 0 and sorted(pool.tables[:, 1].flatten().tolist()) == list(range(1, 16 * 512 + 1))
    assert not pool.tables[:, 0].any()


def test_trained_keys_are_not_folded(tiny_model):
    config = {"window_size": 8, "level": 0, "trained_projections": ["q_proj", "k_proj", "v_proj", "o_proj"], "task_type": "CAUSAL_LM"}
    model = get_peft_model(tiny_model("llama"), DSLAConfig(conversion_unit="head", conversion_order=ORDER, **config)).eval()
    level = [0]
    engine = Engine(model, lambda stats: level[0], SMALL)
    (old,) = ask(engine, [([5, 6, 7], 9)])
    engine.step(), engine.step()
    level[0] = 3
    (new,) = ask(engine, [([5, 6], 9)])
    run(engine)
    assert old.request.levels == [(3, 0)] and new.request.levels == [(2, 3)]
