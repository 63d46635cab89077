"""What transformers' tests of `generate` check of every causal LM, where the tests of paths and levels do not: what is returned, other
ways in than token ids, options of decoding, models changed before they generate. For adapters and for hybrids."""

import copy

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList, MaxTimeCriteria, StoppingCriteria
from transformers.generation import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput
from transformers.generation.configuration_utils import CompileConfig

from dsla_hf import DSLACacheLayer

VOCABULARY = 97
PROMPT, NEW = 20, 8


@pytest.fixture(params=[("adapter", "qwen3"), ("hybrid", "llama"), ("converted throughout", "qwen3")], ids=lambda pair: pair[0])
def model(request, tiny_model, adapter_model):
    """Softmax and DSLA layers side by side, as adapter and as hybrid; and a hybrid of DSLA layers alone. `generate` knows no norms of
    queries and keys, so that each is of one kind."""
    form, kind = request.param
    model = adapter_model(tiny_model(kind), level=4 if form == "converted throughout" else 2).requires_grad_(False)
    return model if form == "adapter" else model.merge_and_unload().eval()


def text(batch=2, tokens=PROMPT):
    return torch.randint(2, VOCABULARY, (batch, tokens))


def generate(model, ids, **options):
    return model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), **{"do_sample": False, "max_new_tokens": NEW, "eos_token_id": None, **options}
    )


def model_of(model):
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def greedy(model, ids, new=NEW):
    """Written out, without a cache and without `generate`."""
    for _ in range(new):
        ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids


# --- what is returned -------------------------------------------------------------------------------------------


EVERYTHING = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "output_hidden_states": True}


@pytest.mark.parametrize("sample", [False, True])
def test_everything_is_returned_with_and_without_a_cache(model, sample):
    ids, found = text(), {}
    for use_cache in (True, False):
        torch.manual_seed(1)
        out = found[use_cache] = generate(model, ids, do_sample=sample, top_k=0, use_cache=use_cache, **EVERYTHING)
        assert isinstance(out, GenerateDecoderOnlyOutput) and out.sequences.shape == (2, PROMPT + NEW)
        assert len(out.scores) == len(out.logits) == len(out.hidden_states) == NEW
        assert all(step.shape == (2, VOCABULARY) for step in out.scores + out.logits)
        for t, layers in enumerate(out.hidden_states):
            tokens = 1 if use_cache and t else PROMPT + t
            assert len(layers) == 5 and all(x.shape == (2, tokens, 32) for x in layers), t
    cached, plain = found[True], found[False]
    assert torch.equal(cached.sequences, plain.sequences)
    for x, y in zip(cached.logits, plain.logits, strict=True):
        torch.testing.assert_close(x, y, atol=1e-4, rtol=0)
    for x, y in zip(cached.hidden_states, plain.hidden_states, strict=True):
        torch.testing.assert_close(x[-1][:, -1], y[-1][:, -1], atol=1e-4, rtol=0)
    assert plain.past_key_values is None
    assert isinstance(cached.past_key_values, DynamicCache) and cached.past_key_values.get_seq_length() == PROMPT + NEW - 1
    assert sum(isinstance(layer, DSLACacheLayer) for layer in cached.past_key_values.layers) == model.get_level()


@pytest.mark.parametrize("sample", [False, True])
def test_everything_is_returned_by_beams(model, sample):
    ids = text()
    options = {"num_beams": 3, "num_return_sequences": 2, "do_sample": sample, "top_k": 0}
    found = {}
    for use_cache in (True, False):
        torch.manual_seed(1)
        out = found[use_cache] = generate(model, ids, **options, use_cache=use_cache, **EVERYTHING)
        assert isinstance(out, GenerateBeamDecoderOnlyOutput)
        assert out.sequences.shape == (4, PROMPT + NEW) and out.sequences_scores.shape == (4,)
        assert len(out.scores) == NEW and all(step.shape == (6, VOCABULARY) for step in out.scores)
        assert all(layers[-1].shape[0] == 6 for layers in out.hidden_states[1:])
        assert out.beam_indices.shape[0] == 4 and out.beam_indices[:, :NEW].max() < 6
        torch.manual_seed(1)
        assert torch.equal(generate(model, ids, **options, use_cache=use_cache), out.sequences), "returning more changes the text"
    assert torch.equal(found[True].sequences, found[False].sequences)
    torch.testing.assert_close(found[True].sequences_scores, found[False].sequences_scores, atol=1e-4, rtol=0)
    if not sample:
        transitions = model_of(model).compute_transition_scores(
            found[True].sequences, found[True].scores, found[True].beam_indices, normalize_logits=False
        )
        # A beam's score is the mean of its tokens' log-probabilities.
        torch.testing.assert_close(transitions.sum(1) / NEW, found[True].sequences_scores, atol=1e-4, rtol=0)


def test_attentions_are_those_of_the_softmax_layers(model):
    model_of(model).set_attn_implementation("eager")
    out = generate(model, text(), return_dict_in_generate=True, output_attentions=True)
    for t, layers in enumerate(out.attentions):
        assert [x.shape for x in layers] == [(2, 4, PROMPT if t == 0 else 1, PROMPT + t)] * (4 - model.get_level())
        for x in layers:
            torch.testing.assert_close(x.sum(-1), torch.ones(x.shape[:-1]))


def test_scores_are_the_logits_after_processing(model):
    class Forbid(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores.masked_fill(torch.arange(VOCABULARY) < 50, -torch.inf)

    out = generate(model, text(), logits_processor=LogitsProcessorList([Forbid()]), **EVERYTHING)
    assert (out.sequences[:, PROMPT:] >= 50).all()
    for scores, logits in zip(out.scores, out.logits, strict=True):
        assert torch.equal(scores[:, 50:], logits[:, 50:]) and scores[:, :50].isinf().all() and logits.isfinite().all()


# --- other ways in ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False}])
def test_embeddings_instead_of_token_ids(model, options):
    ids = text()
    expected = generate(model, ids, **options)
    embeddings = model.get_input_embeddings()(ids)
    common = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": None, "attention_mask": torch.ones_like(ids), **options}
    if options.get("use_cache", True):
        assert torch.equal(model.generate(inputs_embeds=embeddings, **common), expected[:, PROMPT:])
    assert torch.equal(model.generate(input_ids=ids, inputs_embeds=embeddings, **common), expected)


def test_a_text_begun_with_embeddings_goes_on_with_token_ids(model):
    ids = text()
    expected = generate(model, ids, max_new_tokens=2 * NEW)
    embeddings = model.get_input_embeddings()(ids)
    first = generate(model, ids, inputs_embeds=embeddings, return_dict_in_generate=True)
    assert torch.equal(generate(model, first.sequences, past_key_values=first.past_key_values), expected)


def test_a_prompt_without_a_mask(model):
    ids = text()
    assert torch.equal(model.generate(ids, do_sample=False, max_new_tokens=NEW, eos_token_id=None), generate(model, ids))


def test_no_prompt_at_all(model):
    out = model.generate(bos_token_id=1, do_sample=False, max_new_tokens=NEW, eos_token_id=None)
    assert torch.equal(out, greedy(model, torch.tensor([[1]])))


def test_options_by_generation_config(model):
    config = GenerationConfig(max_new_tokens=NEW, do_sample=False, num_beams=2, pad_token_id=0)
    ids = text()
    assert torch.equal(
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config), generate(model, ids, num_beams=2)
    )


def test_a_prefilled_cache_serves_several_prompts(model):
    """As it is done with a long system prompt: read once, copied for each request."""
    head, tails = text(1, 30), [text(1, 5), text(1, 9)]
    cache = model(input_ids=head, use_cache=True).past_key_values
    for tail in tails:
        whole = torch.cat([head, tail], 1)
        assert torch.equal(generate(model, whole, past_key_values=copy.deepcopy(cache)), greedy(model, whole))


# --- options of decoding ----------------------------------------------------------------------------------------


def test_one_prompt_several_samples(model):
    ids = text()
    torch.manual_seed(3)
    found = generate(model, ids, do_sample=True, num_return_sequences=3, top_k=0)
    torch.manual_seed(3)
    repeated = generate(model, ids.repeat_interleave(3, 0), do_sample=True, top_k=0)
    assert torch.equal(found, repeated) and len(found.unique(dim=0)) == 6


def test_rows_that_end_are_padded_and_change_nothing_for_the_others(model):
    ids = text(3)
    free = generate(model, ids)
    end = free[0, PROMPT + 2].item()
    found = generate(model, ids, eos_token_id=end, pad_token_id=0)
    for row, expected in zip(found, free, strict=True):
        new = expected[PROMPT:]
        length = PROMPT + ((new == end).nonzero()[0, 0].item() + 1 if (new == end).any() else NEW)
        assert torch.equal(row[:length], expected[:length]) and not row[length:].any()


def test_shortest_and_longest_texts(model):
    ids = text()
    end = generate(model, ids)[0, PROMPT].item()
    out = generate(model, ids[:1], eos_token_id=end, pad_token_id=0, min_new_tokens=4)
    assert out.shape[1] >= PROMPT + 4 and end not in out[0, PROMPT : PROMPT + 4]
    assert generate(model, ids, max_new_tokens=None, max_length=PROMPT + 3).shape == (2, PROMPT + 3)
    assert generate(model, ids, max_new_tokens=1).shape == (2, PROMPT + 1)


def test_criteria_that_stop(model):
    class After(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((input_ids.shape[0],), input_ids.shape[1] >= PROMPT + 3)

    ids = text()
    assert torch.equal(generate(model, ids, stopping_criteria=[After()]), greedy(model, ids, 3))
    assert generate(model, ids, stopping_criteria=[MaxTimeCriteria(0.0)]).shape[1] == PROMPT + 1


@pytest.mark.parametrize("negative", [False, True])
def test_guidance_runs_a_second_text_with_a_cache_of_its_own(model, negative):
    """Classifier-free guidance: the model reads another prompt beside, with another cache, within the same `generate`."""
    ids, other = text(), text(2, 7)
    options = {"negative_prompt_ids": other, "negative_prompt_attention_mask": torch.ones_like(other)} if negative else {}
    found = generate(model, ids, guidance_scale=1.5, **options)
    start = other if negative else ids[:, -1:]
    out = ids
    for _ in range(NEW):
        with_prompt, without = (
            model(input_ids=x, use_cache=False).logits[:, -1].log_softmax(-1) for x in (out, torch.cat([start, out[:, PROMPT:]], 1))
        )
        out = torch.cat([out, (without + 1.5 * (with_prompt - without)).argmax(-1, keepdim=True)], 1)
    assert torch.equal(found, out)


@pytest.mark.parametrize("way", [{"prompt_lookup_num_tokens": 3}, {"assistant": True}])
@pytest.mark.parametrize("sample", [False, True])
def test_candidates_are_accepted_with_what_was_asked_for(model, tiny_model, way, sample):
    ids = text(1)
    options = {"assistant_model": tiny_model("llama", num_hidden_layers=1)} if "assistant" in way else way
    out = generate(model, ids, do_sample=sample, **options, **EVERYTHING)
    assert len(out.scores) == len(out.logits) == out.sequences.shape[1] - PROMPT == NEW
    if not sample:
        assert torch.equal(out.sequences, greedy(model, ids))
        logits = model(input_ids=out.sequences, use_cache=False).logits[:, PROMPT - 1 : -1]
        torch.testing.assert_close(torch.stack(out.logits, 1), logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("level, merged", [(1, True), (2, False)])
def test_generate_compiles_its_steps_into_one_graph(tiny_model, adapter_model, level, merged):
    """With a static cache `generate` compiles the forward of a step: in one piece, and not anew for every token. Compiling takes
    seconds a layer, so there are two; test_assisted_and_compiled.py has a step of the other hybrids and adapters."""
    model = adapter_model(tiny_model("llama", num_hidden_layers=2), conversion_order=[1, 0], level=level).requires_grad_(False)
    model = model.merge_and_unload().eval() if merged else model
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = CompileConfig(backend=backend, mode=None, fullgraph=True)
    compiled._compile_all_devices = True  # else on accelerators only
    ids = text()
    expected = greedy(model, ids)
    for _ in range(2):
        assert torch.equal(generate(model, ids, cache_implementation="static", compile_config=compiled), expected)
    assert 1 <= len(graphs) <= 2


# --- models that were changed -----------------------------------------------------------------------------------


def test_more_tokens_in_the_vocabulary(model):
    model_of(model).resize_token_embeddings(VOCABULARY + 11)
    assert model_of(model).config.vocab_size == VOCABULARY + 11
    ids = torch.randint(VOCABULARY, VOCABULARY + 11, (2, PROMPT))
    out = generate(model, ids, **EVERYTHING)
    assert out.logits[0].shape == (2, VOCABULARY + 11) and torch.equal(out.sequences, greedy(model, ids))


def test_activation_checkpointing_leaves_generate_as_it_is(model):
    ids = text()
    expected = generate(model, ids)
    base = model_of(model)
    getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)()
    assert torch.equal(generate(model, ids), expected)


def test_half_precision_without_a_mask(model):
    model.to(torch.bfloat16)
    out = generate(model, text(), return_dict_in_generate=True)
    assert out.sequences.shape == (2, PROMPT + NEW)
    for layer in out.past_key_values.layers:
        if isinstance(layer, DSLACacheLayer):
            assert layer.state.recurrent.dtype == torch.float32


def test_only_the_last_logits_are_computed(model):
    """`generate` asks for one position of a prompt; asking for all gives the same text."""
    ids = text()
    sizes = []
    head = model_of(model).lm_head
    handle = head.register_forward_hook(lambda module, args, out: sizes.append(out.shape[1]))
    expected = generate(model, ids)
    assert set(sizes) == {1}
    sizes.clear()
    assert torch.equal(generate(model, ids, logits_to_keep=0), expected) and max(sizes) == PROMPT
    handle.remove()


def test_train_mode_changes_nothing(model):
    """During training, for samples in between; there is no dropout here, so the text is the same."""
    ids = text()
    expected = generate(model, ids)
    assert torch.equal(generate(model.train(), ids), expected)


def test_export_takes_a_hybrid(tiny_model, adapter_model):
    base = tiny_model("llama", num_hidden_layers=2)
    model = adapter_model(base, conversion_order=[1, 0], level=1).requires_grad_(False).merge_and_unload().eval()
    ids = text()
    exported = torch.export.export(model, (), {"input_ids": ids, "use_cache": False}, strict=False)
    torch.testing.assert_close(exported.module()(input_ids=ids, use_cache=False).logits, model(ids).logits, atol=1e-5, rtol=0)
