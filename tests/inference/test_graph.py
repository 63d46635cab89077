"""Decoding by replay: the text of `generate`, from steps that are recorded once and run at fixed addresses."""

import copy
import logging
import re

import pytest
import torch
from captured_texts import IDS, MASK, check_captured_text
from server import byte_tokenizer
from transformers import DynamicCache, LogitsProcessor, StaticCache, StoppingCriteria

import dsla_hf.inference.decode_attention
import dsla_hf.inference.graph
from dsla_hf import LevelProcessor, cache_bytes
from dsla_hf.core.cache import StaticDSLACacheLayer, VisibleStaticLayer
from dsla_hf.inference.draws import Row, exactly
from dsla_hf.inference.graph import GraphDecoder, PlainRecording
from dsla_hf.inference.sampling import Sampling

pytestmark = pytest.mark.usefixtures("small_views")


# Each value beside each of another option, at least once.
@pytest.mark.parametrize(
    "base_kind, level, window_size, padded",
    [
        ("llama", 0, 8, True),
        ("llama", 2, 0, False),
        ("llama", 2, 8, True),
        ("llama", 4, 8, False),
        ("qwen3", 0, 8, False),
        ("qwen3", 2, 8, False),
        ("qwen3", 4, 0, True),
    ],
)
def test_the_text_is_that_of_generate(tiny_model, adapter_model, base_kind, recorder, window_size, level, padded):
    model = adapter_model(tiny_model(base_kind), window_size=window_size, level=level)
    options = {"input_ids": IDS, "attention_mask": MASK if padded else torch.ones_like(MASK), "max_new_tokens": 32, "do_sample": False}
    expected = model.generate(**options)
    decoder = recorder.decoder_of(model)
    for _ in range(2):
        assert torch.equal(decoder.generate(**options), expected)
    # Views of 16, 32 and all 44 places: each step of the first text at a new view runs as it is.
    assert recorder.recorded == 3
    assert recorder.replayed == 2 * 31 - 3


def test_hybrids_and_models_without_adapter(tiny_model, adapter_model, recorder):
    adapter = adapter_model(tiny_model("llama"), level=2)
    hybrid = copy.deepcopy(adapter).merge_and_unload().eval()
    for model in (hybrid, tiny_model("llama")):
        expected = model.generate(IDS, max_new_tokens=30, do_sample=False)
        assert torch.equal(recorder.decoder_of(model).generate(IDS, max_new_tokens=30, do_sample=False), expected)


def test_eager_attention_and_sampling(tiny_model, adapter_model, recorder):
    """Draws are by seed and place: what a text gets hangs neither on its row nor on padding, and a full forward explains each token."""
    model = adapter_model(tiny_model("llama"), level=2)
    model.get_base_model().set_attn_implementation("eager")
    options = {"max_new_tokens": 30, "do_sample": True, "top_k": 20, "temperature": 0.7, "pad_token_id": 0}
    decoder = recorder.decoder_of(model)
    found = decoder.generate(IDS, attention_mask=MASK, seed=5, **options)
    length = IDS.shape[1]
    for row in range(len(IDS)):
        prompt = IDS[row : row + 1, MASK[row].bool()]
        text = recorder.decoder_of(model).generate(prompt, seed=5 + row, **options)
        assert torch.equal(text[0, prompt.shape[1] :], found[row, length:])
        logits = model(text).logits[0, prompt.shape[1] - 1 : -1]
        rows = [Row(Sampling(0.7, top_k=20), 5 + row, prompt.shape[1] + i) for i in range(len(logits))]
        assert torch.equal(exactly(logits, rows), text[0, prompt.shape[1] :])


def test_seeds_of_draws(tiny_model, recorder):
    model = tiny_model("llama")
    options = {"max_new_tokens": 12, "do_sample": True}
    decoder = recorder.decoder_of(model)
    torch.manual_seed(1)
    first, other = decoder.generate(IDS, **options), decoder.generate(IDS, **options)
    torch.manual_seed(1)
    assert torch.equal(decoder.generate(IDS, **options), first) and not torch.equal(first, other)
    assert torch.equal(decoder.generate(IDS, seed=-(2**63), **options), decoder.generate(IDS, seed=-(2**63), **options))
    with pytest.raises(ValueError, match="seed"):
        decoder.generate(IDS, seed=2**63, **options)
    # Where no graphs can run, seeds are of PyTorch's generator, for the call.
    decoder, state = GraphDecoder(model), torch.get_rng_state()
    found = decoder.generate(IDS, seed=3, **options)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(3)
    assert torch.equal(model.generate(IDS, **options), found)


def test_rows_end_where_they_end_in_generate_and_streamers_see_each_token(tiny_model, recorder):
    model = tiny_model("llama", eos_token_id=None)
    text = model.generate(IDS, max_new_tokens=40, do_sample=False)
    options = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": [int(text[0, 20]), int(text[1, 25])], "pad_token_id": 0}
    expected = model.generate(IDS, **options)
    assert expected.shape[1] < text.shape[1]
    assert torch.equal(recorder.decoder_of(model).generate(IDS, **options), expected)

    class Streamer:
        def __init__(self):
            self.tokens, self.ended = [], False

        def put(self, tokens):
            self.tokens += tokens.flatten().tolist()

        def end(self):
            self.ended = True

    streamer = Streamer()
    found = recorder.decoder_of(model).generate(IDS[:1], max_new_tokens=5, do_sample=False, streamer=streamer)
    assert streamer.tokens == found[0].tolist() and streamer.ended


def test_stop_strings(tiny_model, recorder):
    """Transformers keeps the tokenizer from custom loops, and says that none was given."""
    model = tiny_model("llama", eos_token_id=None)
    whole = model.generate(IDS, max_new_tokens=40, do_sample=False)
    tokenizer = byte_tokenizer()
    stop = {"stop_strings": [tokenizer.decode(whole[0, 20:22])], "tokenizer": tokenizer}
    options = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0}
    for rows in (1, 2):
        expected = model.generate(IDS[:rows], **options, **stop)
        assert rows == 2 or expected.shape[1] < whole.shape[1]
        assert torch.equal(recorder.decoder_of(model).generate(IDS[:rows], **options, **stop), expected)
    with pytest.raises(ValueError, match="pass the model's tokenizer"):
        recorder.decoder_of(model).generate(IDS, **options, stop_strings="x")


def test_processors_and_criteria_are_heard(tiny_model, recorder):
    class Never(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores.index_fill(1, torch.tensor([input_ids[0, -1].item()]), float("-inf"))

    class Enough(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 20)

    model = tiny_model("llama")
    options = {"max_new_tokens": 40, "do_sample": False, "logits_processor": [Never()], "stopping_criteria": [Enough()]}
    expected = model.generate(IDS, **options)
    assert expected.shape[1] == 20
    assert torch.equal(recorder.decoder_of(model).generate(IDS, **options), expected)


@pytest.mark.parametrize(
    "base_kind, padded, keep", [("llama", True, True), ("llama", False, False), ("qwen3", True, False), ("qwen3", False, True)]
)
def test_levels_rise_in_mid_text_and_the_next_text_uses_the_same_graphs(tiny_model, adapter_model, base_kind, recorder, padded, keep):
    model = adapter_model(tiny_model(base_kind), level=0)

    def policy(stats):
        return 0 if stats.tokens < 20 else 2 if stats.tokens < 28 else 4

    mask = MASK if padded else torch.ones_like(MASK)
    options = {"attention_mask": mask, "max_new_tokens": 40, "do_sample": False, "return_dict_in_generate": True}
    expected = model.generate(IDS, level_policy=policy, **options)
    decoder = recorder.decoder_of(model, keep=keep)
    for text in range(2):
        processor = LevelProcessor(model, policy)
        found = decoder.generate(IDS, level_policy=processor, **options)
        assert torch.equal(found.sequences, expected.sequences)
        assert [level for _, level in processor.history] == [0, 2, 4]
        assert all(isinstance(layer, StaticDSLACacheLayer) for layer in found.past_key_values.layers)
        assert cache_bytes(found.past_key_values) == cache_bytes(expected.past_key_values)
        if text == 0:
            recorded = recorder.recorded
            freed = not any(layer.is_initialized for layer in decoder.workspace.softmax.values())
            assert freed == (not keep)
    assert (recorder.recorded == recorded) == keep


@pytest.mark.parametrize("base_kind, padded", [("llama", True), pytest.param("qwen3", False, marks=pytest.mark.slow)])
def test_softmax_layers_read_the_cache_as_far_as_it_is_filled(
    tiny_model, adapter_model, base_kind, recorder, padded, interpreted_kernels, monkeypatch
):
    """Through the kernel of softmax layers, one recording a level serves texts of every length."""
    model = adapter_model(tiny_model(base_kind, num_hidden_layers=3), conversion_order=[1, 0, 2], level=1)
    options = {"input_ids": IDS, "attention_mask": MASK if padded else torch.ones_like(MASK), "max_new_tokens": 7, "do_sample": False}
    options["prefill_chunk_size"] = 5  # prompts that go on behind a cache
    with monkeypatch.context() as patch:
        patch.setattr("dsla_kernels.dispatch.choice", "pytorch")
        expected = model.generate(**options, level_policy=after_three_tokens)
    model.set_level(1)
    decoder = recorder.decoder_of(model, max_length=40)
    calls = []
    kernel = dsla_hf.inference.decode_attention.softmax_decode
    monkeypatch.setattr(
        dsla_hf.inference.decode_attention, "softmax_decode", lambda *args, **kwargs: (calls.append(1), kernel(*args, **kwargs))[1]
    )
    assert torch.equal(decoder.generate(**options, level_policy=after_three_tokens), expected)
    assert recorder.recorded == 2 and calls
    assert model.get_base_model().config._attn_implementation == "sdpa"  # as it was


def after_three_tokens(stats):
    return 2 if stats.tokens >= 15 else 1


def test_prepared_levels_need_no_recording_in_the_text(tiny_model, adapter_model, recorder):
    model = adapter_model(tiny_model("llama"), level=1)
    decoder = recorder.decoder_of(model)
    decoder.prepare([0, 2, 4], max_length=40, rows=2, padded=True)
    assert model.get_level() == 1 and recorder.recorded == 3

    def policy(stats):
        return 0 if stats.tokens < 34 else 2 if stats.tokens < 37 else 4

    ids = torch.randint(3, 97, (2, 32))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "level_policy": policy}
    found = decoder.generate(ids, **options)
    assert recorder.recorded == 3 and recorder.replayed == 3 + 7
    assert torch.equal(found, model.generate(ids, **options))


def test_a_text_goes_on_from_the_cache_that_was_returned(tiny_model, adapter_model, recorder):
    model = adapter_model(tiny_model("llama"), level=1)
    decoder = recorder.decoder_of(model, max_length=100)

    def run(generate):
        model.set_level(1)
        first = generate(input_ids=IDS, attention_mask=MASK, max_new_tokens=10, do_sample=False, return_dict_in_generate=True)
        model.set_level(3)
        mask = torch.cat([MASK, torch.ones(2, first.sequences.shape[1] - MASK.shape[1], dtype=MASK.dtype)], 1)
        cache = first.past_key_values
        return generate(input_ids=first.sequences, attention_mask=mask, past_key_values=cache, max_new_tokens=20, do_sample=False)

    assert torch.equal(run(decoder.generate), run(model.generate))
    cache = decoder.workspace.cache
    with pytest.raises(ValueError, match="room for 2 rows of 104 tokens, the text needs 2 of 512: give GraphDecoder a max_length"):
        decoder.generate(input_ids=IDS, past_key_values=cache, max_new_tokens=500)
    model.set_level(0)
    with pytest.raises(RuntimeError, match="level was lowered"):
        decoder.generate(input_ids=torch.cat([IDS] * 4, 1), past_key_values=cache, max_new_tokens=3, do_sample=False)


def test_a_prompt_is_read_in_chunks(tiny_model, adapter_model, recorder):
    model = adapter_model(tiny_model("llama"), level=2)
    options = {"attention_mask": MASK, "max_new_tokens": 20, "do_sample": False}
    found = recorder.decoder_of(model).generate(IDS, prefill_chunk_size=5, **options)
    assert torch.equal(found, model.generate(IDS, **options))

    seen = []
    hook = model.get_base_model().register_forward_hook(lambda module, args, output: seen.append(tuple(output.logits.shape[:2])))
    levels = LevelProcessor(model, lambda stats: 4 if stats.tokens > 6 else 1)
    model.set_level(1)
    recorder.decoder_of(model).generate(IDS, prefill_chunk_size=5, level_policy=levels, **options)
    hook.remove()
    assert seen[:3] == [(2, 1)] * 3, "one logit a chunk"


def test_where_graphs_cannot_run_generate_does_and_says_why(tiny_model, adapter_model, caplog, monkeypatch):
    model = adapter_model(tiny_model("llama"), level=2)
    said = []
    monkeypatch.setattr(dsla_hf.inference.graph.logger, "warning_once", said.append)
    found = GraphDecoder(model).generate(IDS, max_new_tokens=5, do_sample=False)
    assert torch.equal(found, model.generate(IDS, max_new_tokens=5, do_sample=False))
    assert said == ["no CUDA graphs: CUDA graphs need a CUDA device, and this model is on cpu. generate() runs as usual"]
    with caplog.at_level(logging.WARNING), pytest.raises(ValueError, match="need a CUDA device"):
        GraphDecoder(model).prepare([1], max_length=20)


def test_a_step_that_cannot_be_captured_runs_as_it_is(tiny_model, caplog):
    def refuse(step, pool):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    model = tiny_model("llama")
    decoder = GraphDecoder(model, record=refuse)
    found = decoder.generate(IDS, max_new_tokens=20, do_sample=False)
    assert torch.equal(found, model.generate(IDS, max_new_tokens=20, do_sample=False))
    assert caplog.text.count("cannot be recorded (operation not permitted when stream is capturing): it runs as it is") == 1
    assert decoder.recorder.reason == "operation not permitted when stream is capturing"


def test_a_step_without_memory_for_its_graph_runs_as_it_is_and_says_how_to_have_more(tiny_model, caplog):
    def full(step, pool):
        raise torch.OutOfMemoryError("CUDA out of memory")

    model = tiny_model("llama")
    found = GraphDecoder(model, record=full).generate(IDS, max_new_tokens=20, do_sample=False)
    assert torch.equal(found, model.generate(IDS, max_new_tokens=20, do_sample=False))
    assert caplog.text.count("give a smaller max_length, fewer rows, or GraphDecoder(keep=False)") == 1


@pytest.mark.parametrize(
    "options, words",
    [
        ({"num_beams": 2}, "beams"),
        ({"prompt_lookup_num_tokens": 2}, "prompt lookup"),
        ({"output_logits": True}, "output_logits"),
        ({"use_cache": False}, "use_cache=False"),
        ({"attention_mask": torch.ones(2, 1, 12, 12)}, r"attention_mask is \[2, 1, 12, 12\]"),
        ({"past_key_values": DynamicCache()}, "DynamicCache of other making"),
    ],
)
def test_what_a_recorded_step_cannot_do(tiny_model, options, words):
    decoder = GraphDecoder(tiny_model("llama"), record=PlainRecording)
    assert re.search(words, decoder.obstacle(input_ids=IDS, **options))
    assert decoder.obstacle(input_ids=IDS) is None


def test_under_autocast_nothing_is_recorded(tiny_model, adapter_model):
    model = adapter_model(tiny_model("llama"), level=2)
    decoder = GraphDecoder(model, record=PlainRecording)
    with torch.autocast("cpu", torch.bfloat16):
        assert re.search("autocast is on.*torch.bfloat16", decoder.obstacle(input_ids=IDS))
        options = {"input_ids": IDS, "max_new_tokens": 4, "do_sample": False}
        assert torch.equal(decoder.generate(**options), model.generate(**options))


def test_models_whose_steps_look_at_the_length_are_left_alone(tiny_model):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    chunked = tiny_model("llama")
    chunked.config.attention_chunk_size = 8
    for model, words in (
        (chunked, "in chunks"),
        (tiny_model("llama", rope_parameters=rope), "dynamic"),
    ):
        assert words in GraphDecoder(model, record=PlainRecording).obstacle()
    spread = tiny_model("llama")
    spread.hf_device_map = {"model": 0, "lm_head": "cpu"}
    assert "spread over" in GraphDecoder(spread, record=PlainRecording).obstacle()


def test_a_shown_part_of_a_static_cache_is_the_cache(tiny_model):
    model = tiny_model("llama")
    cache = StaticCache(config=model.config, max_cache_len=64)
    cache.layers = [VisibleStaticLayer(64) for _ in cache.layers]
    with torch.no_grad():
        for layer in cache.layers:
            layer.visible = 12
        assert torch.allclose(model(IDS, past_key_values=cache).logits, model(IDS).logits, atol=1e-5)
    assert cache.layers[0].keys.shape[2] == 64 and cache.get_max_length() == 64


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("padded", [False, True])
def test_captured_graphs_give_the_text_of_generate(tiny_model, adapter_model, padded):
    model = adapter_model(tiny_model("llama", hidden_size=64, head_dim=16), level=0).cuda()
    check_captured_text(model, padded, highest=4)


@pytest.mark.parametrize(
    "base_kind, window_size, padded", [("llama", 0, True), ("llama", 8, False), ("qwen3", 0, False), ("qwen3", 8, True)]
)
def test_a_recorded_step_never_waits_for_a_value(tiny_model, adapter_model, base_kind, recorder, watched_recording, window_size, padded):
    model = adapter_model(tiny_model(base_kind), window_size=window_size, level=2)
    options = {"attention_mask": MASK if padded else torch.ones_like(MASK), "max_new_tokens": 24, "do_sample": False}
    expected = model.generate(IDS, **options)
    assert torch.equal(GraphDecoder(model, record=watched_recording).generate(IDS, **options), expected)
