"""Drafts in recorded steps: the text of level 0, caches and buffers at addresses that stay."""

from functools import partial

import pytest
import torch
from captured_texts import IDS

from dsla_hf.core.window_view import WindowView
from dsla_hf.inference import decode_attention
from dsla_hf.inference.drafting import GraphEngine
from dsla_hf.inference.graph import GraphDecoder

pytestmark = pytest.mark.usefixtures("small_views")

UNITS = {
    "layers": {},
    "heads": {"conversion_unit": "head", "conversion_order": [[1, 0], [3, 1], [0, 1], [3, 0], [2, 0], [1, 1], [2, 1], [0, 0]]},
}
TEXT = IDS[:1]


@pytest.fixture(params=UNITS)
def units(request):
    return UNITS[request.param]


def adapter(tiny_model, adapter_model, kind="llama", **config):
    return adapter_model(tiny_model(kind), level=0, **config).requires_grad_(False)


def drafted(found):
    return found.drafted, found.compared, found.accepted, found.checks


@pytest.mark.parametrize(
    "kind, unit, states",
    [
        ("llama", "heads", True),
        ("llama", "layers", True),
        ("llama", "heads", False),
        pytest.param("qwen3", "layers", True, marks=pytest.mark.slow),
    ],
)
def test_greedy_text_and_guesses_are_those_of_generate(tiny_model, adapter_model, recorder, kind, unit, states):
    """That as many guesses are right says that the draft knows the same text."""
    model = adapter(tiny_model, adapter_model, kind, states=states, **UNITS[unit])
    most = model.level_sizes()["max_level"]
    options = {"max_new_tokens": 30, "do_sample": False, "return_dict_in_generate": True}
    rates = []
    for level, tokens in ((1, 4), (most // 2 + 1, 3), (most, 1)):
        decoder = recorder.decoder_of(model, draft_level=level, draft_tokens=tokens)
        for ids in (torch.randint(2, 97, (1, 25)), TEXT, TEXT):
            expected = model.generate(ids, draft_level=level, draft_tokens=tokens, **options)
            found = decoder.generate(ids, **options)
            assert torch.equal(found.sequences, expected.sequences), (level, tokens)
            assert torch.equal(found.sequences, model.generate(ids, max_new_tokens=30, do_sample=False))
            assert drafted(found) == drafted(expected)
            assert model.get_level() == 0 and decoder.workspace.read == expected.sequences.shape[1] - 1
            rates.append(found.accepted / found.compared)
    assert min(rates) < 0.9 and max(rates) > 0.1
    assert recorder.replayed > 2 * recorder.recorded


@pytest.mark.parametrize(
    "kind, unit, config",
    [
        ("llama", "heads", {}),
        ("llama", "layers", {"window_size": 0}),
        pytest.param("llama", "heads", {"states": False}, marks=pytest.mark.slow),
        pytest.param("cohere", "layers", {}, marks=pytest.mark.slow),
    ],
)
def test_a_level_above_0_checks(tiny_model, adapter_model, recorder, kind, unit, config):
    """Its states take in what was accepted alone, and the draft knows them."""
    model = adapter(tiny_model, adapter_model, kind, **config, **UNITS[unit])
    most = model.level_sizes()["max_level"]
    options = {"max_new_tokens": 30, "do_sample": False, "return_dict_in_generate": True}
    rates = []
    for check, draft in ((1, most), (2, 3), (most - 1, most)):
        model.set_level(check)
        decoder = recorder.decoder_of(model, draft_level=draft, draft_tokens=3)
        for ids in (torch.randint(2, 97, (1, 25)), TEXT):
            expected = model.generate(ids, draft_level=draft, draft_tokens=3, **options)
            found = decoder.generate(ids, **options)
            assert torch.equal(found.sequences, expected.sequences), (check, draft)
            assert torch.equal(found.sequences, model.generate(ids, max_new_tokens=30, do_sample=False))
            assert drafted(found) == drafted(expected)
            assert model.get_level() == check and decoder.workspace.read == expected.sequences.shape[1] - 1
            rates.append(found.accepted / found.compared)
    assert min(rates) < 0.9 and max(rates) > 0.1
    assert recorder.replayed > 2 * recorder.recorded


@pytest.mark.parametrize("states", [True, False])
def test_drafts_that_are_longer_than_the_window(tiny_model, adapter_model, recorder, units, states):
    """Places of a window of which several guesses would take the same one."""
    model = adapter(tiny_model, adapter_model, window_size=4, sink_tokens=2, states=states, **units)
    model.set_level(2)
    options = {"max_new_tokens": 40, "do_sample": False, "return_dict_in_generate": True}
    decoder = recorder.decoder_of(model, draft_level=3, draft_tokens=5)
    expected, found = model.generate(TEXT, draft_level=3, draft_tokens=5, **options), decoder.generate(TEXT, **options)
    assert torch.equal(found.sequences, model.generate(TEXT, max_new_tokens=40, do_sample=False))
    assert drafted(found) == drafted(expected) and found.accepted > 0


def test_the_checking_level_changes_between_texts_and_within_one(tiny_model, adapter_model, recorder, units):
    model = adapter(tiny_model, adapter_model, **units)
    decoder = recorder.decoder_of(model, draft_level=4, draft_tokens=3, max_length=80)
    options = {"do_sample": False, "return_dict_in_generate": True}
    for check in (2, 0, 3):
        model.set_level(check)
        expected = model.generate(TEXT, max_new_tokens=20, draft_level=4, draft_tokens=3, **options)
        found = decoder.generate(TEXT, max_new_tokens=20, **options)
        assert torch.equal(found.sequences, expected.sequences) and drafted(found) == drafted(expected)
    model.set_level(1)
    first = decoder.generate(TEXT, max_new_tokens=10, **options)
    cache = model.generate(TEXT, max_new_tokens=10, **options).past_key_values
    model.set_level(3)
    expected = model.generate(first.sequences, past_key_values=cache, max_new_tokens=20, do_sample=False)
    found = decoder.generate(first.sequences, past_key_values=first.past_key_values, max_new_tokens=20, **options)
    assert torch.equal(found.sequences, expected) and found.drafted > 0
    model.set_level(2)
    with pytest.raises(RuntimeError, match="level was lowered"):
        decoder.generate(found.sequences, past_key_values=found.past_key_values, max_new_tokens=5, **options)


@pytest.mark.parametrize("padded", [False, True])
def test_sampled_text_is_that_of_the_same_seed_without_drafts(tiny_model, adapter_model, recorder, units, padded):
    model = adapter(tiny_model, adapter_model, **units)
    mask = torch.ones_like(TEXT)
    mask[:, :5] = 0 if padded else 1
    how = {"do_sample": True, "top_k": 20, "temperature": 0.6, "repetition_penalty": 1.1}
    options = {"attention_mask": mask, "max_new_tokens": 40, **how}
    plain, accepted = recorder.decoder_of(model), 0
    expected = [plain.generate(TEXT, seed=seed, **options) for seed in range(2)]
    decoder = recorder.decoder_of(model, draft_level=2, draft_tokens=3)
    for seed in range(2):
        found = decoder.generate(TEXT, seed=seed, return_dict_in_generate=True, **options)
        assert torch.equal(found.sequences, expected[seed])
        accepted += found.accepted
    assert accepted > 0 and not torch.equal(*expected)
    # Without a seed: rejection sampling by PyTorch's generator, as `generate` of the model.
    texts = []
    for generate in (decoder.generate, partial(model.generate, draft_level=2, draft_tokens=3)):
        torch.manual_seed(3)
        texts.append(generate(TEXT, **options))
    assert torch.equal(*texts)


def test_padding_and_chunks_of_the_prompt(tiny_model, adapter_model, recorder, units):
    model = adapter(tiny_model, adapter_model, **units)
    mask = torch.ones_like(TEXT)
    mask[:, :5] = 0
    options = {"attention_mask": mask, "max_new_tokens": 30, "do_sample": False, "return_dict_in_generate": True}
    expected = model.generate(TEXT, draft_level=3, draft_tokens=3, **options)
    decoder = recorder.decoder_of(model, draft_level=3, draft_tokens=3)
    for chunk in (None, 5):
        found = decoder.generate(TEXT, prefill_chunk_size=chunk, **options)
        assert torch.equal(found.sequences, expected.sequences) and drafted(found) == drafted(expected)


def test_drafts_that_pause_catch_up(tiny_model, adapter_model, recorder, units, monkeypatch):
    """With more tokens behind than a recorded step folds."""

    class Paused:
        longest, lengths = 2, [2]

        def __init__(self):
            self.rounds = 0

        def next(self):
            self.rounds += 1
            return 0 if self.rounds % 9 < 6 else 2

        def record(self, *args):
            pass

    model = adapter(tiny_model, adapter_model, **units)
    options = {"max_new_tokens": 50, "do_sample": False, "return_dict_in_generate": True}
    monkeypatch.setattr("dsla_hf.levels.drafting.lengths_for", lambda tokens: Paused())
    monkeypatch.setattr("dsla_hf.inference.graph.lengths_for", lambda tokens: Paused())
    expected = model.generate(TEXT, draft_level=1, **options)
    found = recorder.decoder_of(model, draft_level=1).generate(TEXT, **options)
    assert torch.equal(found.sequences, expected.sequences) and drafted(found) == drafted(expected)
    assert 0 < found.accepted < found.compared


def test_texts_end_and_go_on(tiny_model, adapter_model, recorder):
    model = adapter(tiny_model, adapter_model)
    whole = model.generate(TEXT, max_new_tokens=40, do_sample=False)
    end = int(whole[0, 20])
    expected = model.generate(TEXT, max_new_tokens=40, do_sample=False, eos_token_id=end)
    decoder = recorder.decoder_of(model, draft_level=3, draft_tokens=4, max_length=64)
    assert torch.equal(decoder.generate(TEXT, max_new_tokens=40, do_sample=False, eos_token_id=end), expected)

    first = decoder.generate(TEXT, max_new_tokens=15, do_sample=False, return_dict_in_generate=True)
    again = decoder.generate(first.sequences, past_key_values=first.past_key_values, max_new_tokens=25, do_sample=False)
    assert torch.equal(again, whole)

    class Streamer(list):
        ended = False

        def put(self, tokens):
            self.extend(tokens.flatten().tolist())

        def end(self):
            self.ended = True

    streamer = Streamer()
    decoder.generate(TEXT, max_new_tokens=40, do_sample=False, streamer=streamer)
    assert streamer == whole[0].tolist() and streamer.ended


def test_other_weights_and_levels_between_texts(tiny_model, adapter_model, recorder, units):
    """What was recorded over the old ones is not used."""
    model = adapter(tiny_model, adapter_model, **units)
    decoder = recorder.decoder_of(model, draft_level=3, draft_tokens=3, keep=False)
    options = {"max_new_tokens": 20, "do_sample": False, "return_dict_in_generate": True}
    for change in range(3):
        expected = model.generate(TEXT, draft_level=3, draft_tokens=3, **options)
        found = decoder.generate(TEXT, **options)
        assert torch.equal(found.sequences, expected.sequences) and drafted(found) == drafted(expected), change
        decoder.draft_level = None
        model.set_level(2 if change else 4)
        assert torch.equal(decoder.generate(TEXT, **options).sequences, model.generate(TEXT, **options).sequences)
        model.set_level(0)
        decoder.draft_level = 3
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "dsla_" in name:
                    parameter.mul_(1.2)


def test_drafts_without_graphs_are_those_of_generate(tiny_model, adapter_model):
    model = adapter(tiny_model, adapter_model)
    decoder = GraphDecoder(model, draft_level=3, draft_tokens=3)
    assert "CUDA" in decoder.obstacle()
    options = {"max_new_tokens": 20, "do_sample": False, "return_dict_in_generate": True}
    expected = model.generate(TEXT, draft_level=3, draft_tokens=3, **options)
    assert drafted(decoder.generate(TEXT, **options)) == drafted(expected)


def test_what_cannot_be_drafted_is_refused(tiny_model, adapter_model, recorder):
    model = adapter(tiny_model, adapter_model)
    with pytest.raises(ValueError, match="draft_tokens=3 without draft_level"):
        GraphDecoder(model, draft_tokens=3)
    with pytest.raises(ValueError, match="draft_tokens must be 1 or more"):
        recorder.decoder_of(model, draft_level=2, draft_tokens=0).generate(TEXT)
    decoder = recorder.decoder_of(model, draft_level=2)
    with pytest.raises(ValueError, match="2 texts in a batch"):
        decoder.generate(IDS)
    model.set_level(3)
    with pytest.raises(ValueError, match="above the level that checks"):
        decoder.generate(TEXT)
    with pytest.raises(ValueError, match="has no levels"):
        recorder.decoder_of(tiny_model("llama"), draft_level=2).generate(TEXT)
    assert decoder.workspace is None


@pytest.mark.parametrize("check, padded", [(0, False), (0, True), (1, True), (2, False)])
def test_a_recorded_step_never_waits_for_a_value(tiny_model, adapter_model, units, watched_recording, check, padded):
    model = adapter(tiny_model, adapter_model, **units)
    model.set_level(check)
    mask = torch.ones_like(TEXT)
    mask[:, :5] = 0 if padded else 1
    options = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False}
    decoder = GraphDecoder(model, draft_level=3, draft_tokens=3, record=watched_recording)
    assert torch.equal(decoder.generate(TEXT, **options), model.generate(TEXT, **options))
    assert {key[1] for key in decoder.recorder.recordings} >= {"follow", "draft", "check", *(["commit"] if check else [])}


@pytest.mark.parametrize("kind", ["llama", "gemma2", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("gpt_oss", "olmo2"))])
def test_windows_alone_are_read_where_they_lie(tiny_model, adapter_model, recorder, kind, units):
    """No state of a draft, and nothing to fold, but where layers slide or prompts are padded."""
    model = adapter(tiny_model, adapter_model, kind, states=False, **units)
    most, slides = model.level_sizes()["max_level"], kind in ("gemma2", "gpt_oss")
    options = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    for level in (1, most // 2, most):
        decoder = recorder.decoder_of(model, draft_level=level, draft_tokens=3)
        for ids in (torch.randint(2, 97, (1, 45)), TEXT):
            expected, found = model.generate(ids, draft_level=level, draft_tokens=3, **options), decoder.generate(ids, **options)
            assert torch.equal(found.sequences, expected.sequences)
            # Of layers that slide a dynamic cache has lost what a fold would take in.
            assert slides or drafted(found) == drafted(expected)
        space = decoder.workspace.drafts
        viewed = [layer for layer in space.cache.layers if isinstance(layer, WindowView)]
        assert len(viewed) + len(space.converted) == sum(part is not False for part in space.parts)
        if not slides:
            assert not space.converted
            assert all(layer.keys.data_ptr() in {x.keys.data_ptr() for x in decoder.workspace.layers()} for layer in viewed)
    assert any(key[1] == "draft" for key in decoder.recorder.recordings)
    padded = torch.ones_like(TEXT)
    padded[:, :4] = 0
    expected = model.generate(TEXT, attention_mask=padded, draft_level=most, draft_tokens=3, **options)
    found = decoder.generate(TEXT, attention_mask=padded, **options)
    assert torch.equal(found.sequences, expected.sequences)
    assert decoder.workspace.drafts.converted
    found = decoder.generate(TEXT, **options)
    assert torch.equal(found.sequences, model.generate(TEXT, **options).sequences)


def test_heads_that_lie_as_in_the_base(tiny_model, adapter_model, recorder):
    """Where projections cannot be in order of conversion, as trained keys would not let them, queries are put in order."""
    model = adapter(tiny_model, adapter_model, "phi3", states=False, **UNITS["heads"])
    options = {"max_new_tokens": 30, "do_sample": False, "return_dict_in_generate": True}
    decoder = recorder.decoder_of(model, draft_level=5, draft_tokens=3)
    expected, found = model.generate(TEXT, draft_level=5, draft_tokens=3, **options), decoder.generate(TEXT, **options)
    assert torch.equal(found.sequences, expected.sequences) and drafted(found) == drafted(expected)


@pytest.mark.parametrize(
    "unit, check, padded, states",
    [("layers", 0, True, True), ("heads", 0, False, True), ("heads", 1, True, True), ("heads", 0, False, False)],
)
def test_kernels_of_drafts(tiny_model, adapter_model, recorder, unit, check, padded, states, interpreted_kernels, monkeypatch):
    """Steps of guesses run in them, over states that are written in place, and checks of several tokens."""
    order = [[1, 0], [0, 1], [1, 1]] if unit == "heads" else [1, 0]
    config = {"conversion_order": order, "conversion_unit": unit.removesuffix("s"), "states": states}
    model = adapter_model(tiny_model("llama", num_hidden_layers=2), level=check, **config).requires_grad_(False)
    mask = torch.ones_like(TEXT)
    mask[:, :5] = 0 if padded else 1
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True}
    decoder, checked = recorder.decoder_of(model, draft_level=len(order), draft_tokens=2), []
    kernel = decode_attention.softmax_decode
    monkeypatch.setattr(
        decode_attention, "softmax_decode", lambda q, *args, **kwargs: checked.append(q.shape[1]) or kernel(q, *args, **kwargs)
    )
    found = decoder.generate(TEXT, **options)
    monkeypatch.undo()
    assert 3 in checked
    expected = model.generate(TEXT, draft_level=len(order), draft_tokens=2, **options)
    assert decoder.workspace.by_length
    assert torch.equal(found.sequences, expected.sequences) and drafted(found) == drafted(expected)


@pytest.mark.parametrize("tokens", [None, 3])
def test_the_next_draft_begins_before_the_host_knows_the_text(tiny_model, adapter_model, recorder, tokens, monkeypatch):
    """Where drafts only read what the checking level has; the text, its end and what goes on behind it are as without a draft."""
    model = adapter(tiny_model, adapter_model, states=False, **UNITS["heads"])
    ahead, begin = [], GraphEngine.draft_ahead

    def counted(self, *args):
        ahead.append(begin(self, *args))
        return ahead[-1]

    monkeypatch.setattr(GraphEngine, "draft_ahead", counted)
    decoder = recorder.decoder_of(model, draft_level=5, draft_tokens=tokens, max_length=120)
    text = model.generate(TEXT, max_new_tokens=60, do_sample=False, eos_token_id=None, pad_token_id=0)
    start = TEXT.shape[1]
    options = {"do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    found = decoder.generate(TEXT, max_new_tokens=40, eos_token_id=None, **options)
    assert torch.equal(found.sequences, text[:, : start + 40])
    assert sum(guesses is not None for guesses in ahead) > (0 if tokens is None else found.checks // 2)
    decoder.draft_level = None  # others may go on, and drafts behind them
    found = decoder.generate(found.sequences, past_key_values=found.past_key_values, max_new_tokens=5, eos_token_id=None, **options)
    decoder.draft_level = 5
    found = decoder.generate(found.sequences, past_key_values=found.past_key_values, max_new_tokens=15, eos_token_id=None, **options)
    assert torch.equal(found.sequences, text)
    for place in range(start + 3, start + 12):  # wherever in a round
        end = int(text[0, place])
        expected = model.generate(TEXT, max_new_tokens=40, do_sample=False, eos_token_id=end, pad_token_id=0)
        found = decoder.generate(TEXT, max_new_tokens=40, eos_token_id=end, **options)
        assert torch.equal(found.sequences, expected) and decoder.workspace.read == expected.shape[1] - 1
        more = {"past_key_values": found.past_key_values, "max_new_tokens": 4, "eos_token_id": None, **options}
        wanted = model.generate(expected, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert torch.equal(decoder.generate(expected, **more).sequences, wanted)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("states, check", [(False, 0), (True, 0), (True, 1)])
def test_captured_drafts_give_the_text_of_generate(tiny_model, adapter_model, units, states, check):
    model = adapter_model(tiny_model("llama", hidden_size=64, head_dim=16), level=check, states=states, **units).cuda()
    ids = torch.randint(3, 97, (1, 40), device="cuda")
    options = {"max_new_tokens": 80, "do_sample": False}
    expected = model.generate(ids, **options)
    decoder = GraphDecoder(model, draft_level=3, draft_tokens=4)
    for _ in range(2):
        assert torch.equal(decoder.generate(ids, **options), expected)
    assert decoder.recorder.reason is None
    folds = {"follow"} if states else set()
    assert {key[1] for key in decoder.recorder.recordings if len(key) > 3} == {"draft", "check", *folds, *(["commit"] if check else [])}
