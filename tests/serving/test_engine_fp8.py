"""Keys and values of kept heads in fp8: each text is that of `generate` over keys and values that are rounded by hand, whatever meets."""

import random

import pytest
import torch
from engine_texts import alone, ask, assert_empty, options, prompts, run
from prometheus_client import generate_latest
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from dsla_hf.inference.recorder import CudaRecording, PlainRecording
from dsla_hf.serving.engine.engine import Engine
from dsla_hf.serving.engine.kv_dtype import kv_dtype
from dsla_hf.serving.engine.levels import Levels
from dsla_hf.serving.http.metrics import Metrics
from dsla_hf.serving.usage import what_is_served
from dsla_kernels import dispatch

PREFIX = prompts(1, 32, 32, seed=7)[0]
UNITS = ["layers", "heads"]


def fp8(**changes):
    return options(kv_cache_dtype="fp8", **changes)


@pytest.fixture
def rounded(monkeypatch):
    """Caches of transformers keep keys and values as e4m3 has them: the truth. The engine's are none of them."""
    for layer in (DynamicLayer, DynamicSlidingWindowLayer):

        def update(self, keys, values, *args, before=layer.update, **kwargs):
            both = (x.clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype) for x in (keys, values))
            return before(self, *both, *args, **kwargs)

        monkeypatch.setattr(layer, "update", update)


@pytest.fixture(params=UNITS)
def model(request, tiny_model, adapter_model, head_model):
    """Levels that count layers, or KV heads."""
    return adapter_model(tiny_model("llama")) if request.param == "layers" else head_model().requires_grad_(False)


def level_policy(raises):
    """As `generate` counts: a raise of the engine came before the forward that makes token `at`."""
    first, *later = raises
    return lambda stats: max([first[1], *(to for at, to in later if stats.tokens >= at)])


def check(engine, model, wanted, level):
    ears = ask(engine, wanted)
    run(engine)
    expected = [alone(model, prompt, tokens, level) for prompt, tokens in wanted]
    assert [ear.tokens for ear in ears] == expected
    assert_empty(engine)
    return expected


# --- texts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("record", [None, PlainRecording])
@pytest.mark.parametrize("level", [0, 3])
def test_texts_are_those_over_rounded_keys_and_values(model, level, record, rounded, monkeypatch):
    wanted = [(prompt, 6 + 5 * i) for i, prompt in enumerate(prompts(6))]
    expected = check(Engine(model, level, fp8(), record=record), model, wanted, level)
    monkeypatch.undo()
    assert expected != [alone(model, prompt, tokens, level) for prompt, tokens in wanted], "rounding is seen"


@pytest.mark.parametrize("level", [0, 1])
def test_in_blocks_by_pytorch(model, level, rounded, in_blocks):
    """Pieces that begin texts, others, several prompts in one, and steps."""
    wanted = [(prompt, 5 + i) for i, prompt in enumerate([*prompts(5), [7]])]
    check(Engine(model, level, fp8(slots=8, chunk=16)), model, wanted, level)


@pytest.mark.parametrize("unit", [unit if unit == "heads" else pytest.param(unit, marks=pytest.mark.slow) for unit in UNITS])
def test_in_blocks_by_kernels(tiny_model, adapter_model, unit, rounded, interpreted_kernels, monkeypatch):
    heads = {"conversion_unit": "head", "conversion_order": [[1, 0], [0, 1], [1, 1]]}
    model = adapter_model(tiny_model("llama", num_hidden_layers=2), **(heads if unit == "heads" else {"conversion_order": [1, 0]}))

    def append(*arguments, **options):  # not by the interpreter, which rounds carelessly
        with monkeypatch.context() as patch:
            patch.setattr("dsla_kernels.dispatch.choice", "pytorch")
            dispatch.append(*arguments, **options)

    monkeypatch.setattr("dsla_hf.serving.engine.pool.append", append)
    engine = Engine(model, 1, fp8(draft_level=2, draft_tokens=2, draft_rows=3), record=PlainRecording)
    wanted = [([5, 6, 7, 8], 7), ([9, 3, 4], 5), (PREFIX[:20], 3)]
    ears = ask(engine, wanted)
    run(engine)
    assert engine.runner.in_blocks and engine.drafts.rounds > 1
    monkeypatch.setattr("dsla_kernels.dispatch.choice", "auto")
    assert [ear.tokens for ear in ears] == [alone(model, prompt, tokens, 1) for prompt, tokens in wanted]


@pytest.mark.parametrize("kind", ["gemma3_text", "gpt_oss", "mixtral"])
def test_other_bases(tiny_model, adapter_model, kind, rounded):
    model = adapter_model(tiny_model(kind))
    check(Engine(model, 1, fp8()), model, [(prompt, 12) for prompt in prompts(3, longest=30)], 1)


def test_a_base_alone_and_numbers_beyond_the_largest(tiny_model, rounded):
    base = tiny_model("llama")
    with torch.no_grad():
        for layer in base.model.layers:
            layer.self_attn.v_proj.weight.mul_(1000)
    wanted = [(prompt, 8) for prompt in prompts(3)]
    engine = Engine(base, 0, fp8())
    check(engine, base, wanted, None)
    held = engine.memory.pool.values.float()
    assert held.abs().max() == 448 and held.isfinite().all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("unit", UNITS)
def test_captured(tiny_model, adapter_model, head_model, unit, rounded):
    """As tests of the engine on a GPU do, with models of float32: what is recorded is what the plain calls give."""
    sizes = {"hidden_size": 64, "head_dim": 16}
    model = adapter_model(tiny_model("llama", **sizes)) if unit == "layers" else head_model(base=sizes).requires_grad_(False)
    model, found = model.cuda(), []
    for record in (None, CudaRecording):
        engine = Engine(model, 1, fp8(draft_level=3, draft_tokens=2), record=record)
        engine.prepare()
        ears = ask(engine, [(prompt * 2, 30) for prompt in prompts(4)])
        run(engine)
        found.append([ear.tokens for ear in ears])
    assert found[0] == found[1] and engine.runner.recorder.reason is None and engine.runner.in_blocks


# --- what meets blocks --------------------------------------------------------------------------------------------


def test_raises_fold_what_is_rounded(model, rounded):
    level = [0]
    engine = Engine(model, lambda stats: level[0], fp8(chunk=64))
    wanted = [(prompt, 24) for prompt in prompts(3, 4, 12)]
    ears = ask(engine, wanted)
    for step, to in ((4, 1), (8, 2), (12, engine.control.highest - 1)):
        while len(ears[0].tokens) < step:
            engine.step()
        level[0] = to
    run(engine)
    for (prompt, tokens), ear in zip(wanted, ears, strict=True):
        assert len(ear.request.levels) == 4
        assert ear.tokens == alone(model, prompt, tokens, 0, level_policy=level_policy(ear.request.levels))
    assert_empty(engine)


@pytest.mark.parametrize("level", [0, 2])
@pytest.mark.parametrize("drafts", [{}, {"draft_level": 4}, {"draft_lookup": True}], ids=str)
def test_chats_share_prefixes_and_have_drafts(model, level, drafts, rounded):
    """Blocks, and snapshots with the beginning of a block, are found again as they were left."""
    more = {"draft_tokens": 3, **drafts} if drafts else {}
    engine = Engine(model, level, fp8(chunk=16, snapshot_bytes=2**18 if level else 0, **more))
    numbers, texts = random.Random(5), [PREFIX, PREFIX[:21], PREFIX[:9]]
    for _ in range(4):
        ears = ask(engine, [(text, numbers.randint(1, 14)) for text in texts])
        run(engine)
        for ear in ears:
            assert ear.tokens == alone(model, ear.request.prompt, ear.request.max_tokens, level)
        texts = [ear.request.text + prompts(1, 1, 9, seed=numbers.random())[0] for ear in ears]
        assert_empty(engine)
    assert engine.prefix_hits > 150 and (not drafts or engine.drafts.rounds > 5)


def test_guesses_are_those_of_generate(model, rounded):
    wanted, level = [(prompt, 12 + 7 * i) for i, prompt in enumerate(prompts(3))], 1
    engine = Engine(model, level, fp8(draft_level=3, draft_tokens=3))
    ears = ask(engine, wanted)
    run(engine)
    model.set_level(level)
    drafts = {"draft_level": 3, "draft_tokens": 3, "return_dict_in_generate": True}
    found = [model.generate(torch.tensor([prompt]), max_new_tokens=most, do_sample=False, **drafts) for prompt, most in wanted]
    assert [ear.tokens for ear in ears] == [
        out.sequences[0, len(prompt) :].tolist() for out, (prompt, _) in zip(found, wanted, strict=True)
    ]
    assert engine.drafts.accepted == sum(out.accepted for out in found) > 0, "drafts know the same text"


def test_a_prefix_of_a_lower_level_is_a_raise(model, rounded):
    level = [0]
    engine = Engine(model, lambda stats: level[0], fp8(chunk=16, snapshot_bytes=2**18, lower_prefixes=True))
    ask(engine, [(PREFIX, 2)])
    run(engine)
    level[0] = 3
    (ear,) = ask(engine, [(PREFIX + [5, 6, 7], 10)])
    run(engine)
    at, to = ear.request.history[-1]
    assert engine.reuse.hits["lower"] == 1 and to == 3
    model.set_level(0)
    ids = torch.tensor([ear.request.text])
    with torch.no_grad():
        cache = model(ids[:, :at], use_cache=True).past_key_values
        model.set_level(3)
        logits = model(ids[:, at:], past_key_values=cache).logits
    assert logits[0, len(ear.request.prompt) - at - 1 : -1].argmax(-1).tolist() == ear.tokens
    assert_empty(engine)


# --- memory, and what is refused ----------------------------------------------------------------------------------


def test_memory_holds_more_tokens_and_is_told(model):
    plain, narrow = (Engine(model, 1, options(slots=64, kv_cache_dtype=dtype)) for dtype in ("auto", "fp8"))
    assert narrow.memory.pool.num_blocks == 4 * plain.memory.pool.num_blocks, "of a model in float32"
    kept = [sum(x.nbytes for x in (engine.memory.pool.keys, engine.memory.pool.values)) for engine in (plain, narrow)]
    assert kept[1] <= 2**20 + narrow.bytes_per_block and abs(kept[1] - kept[0]) < 2 * plain.bytes_per_block
    assert narrow.memory.pool.keys.dtype == torch.float8_e4m3fn and plain.memory.pool.keys.dtype == torch.float32
    assert [state.window_k.dtype for state in narrow.memory._states.values()] == [torch.float32] * len(narrow.memory._states)
    heads = 7 if narrow.levels.unit == "head" else 6
    assert narrow.snapshot()["bytes_per_token"] == 2 * heads * 8 and plain.snapshot()["bytes_per_token"] == 4 * 2 * heads * 8
    assert f"dsla_kv_bytes_per_token {2.0 * heads * 8}" in generate_latest(Metrics(narrow, "m").registry).decode()
    said = what_is_served(narrow, "m", chats=False, key=False)
    assert f"torch.float8_e4m3fn, 128 bytes a token at level 0, {16 * heads} bytes a token at level 1" in said
    seen = [engine.stats().softmax_bytes_per_token for engine in (plain, narrow)]
    assert seen[0] == 4 * seen[1] and plain.stats().dsla_bytes == narrow.stats().dsla_bytes


def test_what_cannot_be_is_refused_by_name(model):
    with pytest.raises(ValueError, match="kv_cache_dtype must be one of auto, fp8, got 'int8'"):
        options(kv_cache_dtype="int8")
    model.set_level(model.level_sizes()["max_level"])
    hybrid = model.merge_and_unload().eval()
    with pytest.raises(ValueError, match="kv_cache_dtype 'fp8' is of no use: all 8 KV heads of this model are DSLA; leave it out"):
        Engine(hybrid, "load", fp8())


def test_a_card_without_fp8_is_refused(tiny_model, monkeypatch):
    levels = Levels(tiny_model("llama").bfloat16())
    levels.device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with pytest.raises(ValueError, match=r"'fp8' needs a card of compute capability 8.9 or more, this one has 8.6: leave it out"):
        kv_dtype("fp8", levels)
    assert kv_dtype("auto", levels) == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert kv_dtype("fp8", levels) == torch.float8_e4m3fn
