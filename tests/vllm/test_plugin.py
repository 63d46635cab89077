"""What of the plugin works without vLLM: it stays out of the way, says what can be served, and knows what a page holds."""

import subprocess
import sys
import warnings

import pytest
import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

import dsla_hf.vllm
from dsla_hf import DSLAConfig, DualState, DualStateAttention
from dsla_hf.vllm.checks import check_pages, check_servable
from dsla_hf.vllm.pages import Place, converted_heads, of_heads, page_parts, places, read_state, write_state
from dsla_hf.vllm.prefills import Prefill, alike
from dsla_hf.vllm.ranks import RankHeads, indices, own_part, rank_heads

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def config_of(base="llama", **dsla):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(base, **SIZES))
    return get_peft_model(model, DSLAConfig(**{"conversion_order": [2, 0], **dsla})).merge_and_unload().config


def test_importing_dsla_hf_does_not_import_vllm():
    code = "import sys, dsla_hf, dsla_hf.vllm; sys.exit('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_without_vllm_the_entry_point_does_nothing():
    # None in sys.modules is how Python marks a module that cannot be imported; find_spec is told so by a finder.
    code = (
        "import importlib.util, sys\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'vllm' else find(name, *rest)\n"
        "sys.modules['vllm'] = None\n"
        "import dsla_hf.vllm\n"
        "assert dsla_hf.vllm.register() is None\n"
        "assert 'dsla_hf.vllm.models' not in sys.modules\n"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(("found", "warns"), [("0.26.0", False), ("0.32.0+cpu", False), (None, False), ("0.33.1", True)])
def test_another_release_is_said_once(monkeypatch, found, warns):
    monkeypatch.setattr(dsla_hf.vllm, "installed_version", lambda: found)
    dsla_hf.vllm._warn_of_untested_version.cache_clear()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        dsla_hf.vllm._warn_of_untested_version()
        dsla_hf.vllm._warn_of_untested_version()
    assert [found in str(entry.message) for entry in said] == ([True] if warns else [])
    dsla_hf.vllm._warn_of_untested_version.cache_clear()


@pytest.mark.parametrize("base", ["llama", "mistral", "qwen2", "qwen3"])
def test_what_can_be_served(base):
    config = config_of(base)
    config.sliding_window = None
    check_servable(config)
    config.sliding_window = 4096
    with pytest.raises(ValueError, match="sliding_window=4096"):
        check_servable(config)


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"of type 'olmo2': it can those of llama, mistral, qwen2"):
        check_servable(config_of("olmo2"))
    biased = config_of("gemma")
    check_servable(biased)
    biased.attention_bias = True
    with pytest.raises(ValueError, match=r"gemma, whose attention has biases \(attention_bias=True\)"):
        check_servable(biased)
    check_servable(config_of(), tensor_parallel=2)
    with pytest.raises(ValueError, match="2 key-value heads cannot be divided among 4 processes"):
        check_servable(config_of(), tensor_parallel=4)
    scaled = config_of()
    scaled.quantization_config = {"quant_method": "compressed-tensors", "kv_cache_scheme": None}
    check_servable(scaled)
    scaled.quantization_config["kv_cache_scheme"] = {"num_bits": 8, "type": "float"}
    with pytest.raises(ValueError, match="kv_cache_scheme in quantization_config"):
        check_servable(scaled)
    with pytest.raises(ValueError, match="pipeline_parallel_size=2"):
        check_servable(config_of(), pipeline_parallel=2)
    with pytest.raises(ValueError, match="speculative-config"):
        check_servable(config_of(), speculative=True)


def test_kept_heads_that_a_release_cannot_pack_are_refused():
    kept = {1: 2, 3: 3}
    check_pages(4, kept, layouts=True)
    check_pages(4, {1: 2, 2: 1, 3: 0}, layouts=False)
    with pytest.raises(ValueError, match="of whose layer 3 3 of 4 KV heads are kept"):
        check_pages(4, kept, layouts=False)


def test_a_hybrid_says_the_kind_of_each_layer():
    assert config_of().layers_block_type == ["linear_attention", "attention", "linear_attention"]


@pytest.mark.parametrize(
    "dsla", [{"window_size": 4, "sink_tokens": 2}, {"window_size": 0}, {"window_size": 4, "sink_tokens": 2, "states": False}], ids=str
)
def test_a_page_holds_all_of_a_state(dsla):
    config = config_of(**dsla)
    torch.manual_seed(0)
    layer = DualStateAttention(4, 2, 8, **config.get_dsla_config().mathematics())
    q, k, v = torch.randn(2, 7, 4, 8), torch.randn(2, 7, 2, 8), torch.randn(2, 7, 2, 8)
    with torch.no_grad():
        state = layer(q, k, v, output_state=True)[1]
    # Of a page of five heads this layer has two, from the second on.
    parts = page_parts(config, torch.float32, 5)
    whole = tuple(torch.full((5, *shape), torch.nan, dtype=dtype) for shape, dtype in parts)
    page = of_heads(whole, 1, 2, layer.states)
    slots = torch.tensor([3, 1])
    write_state(page, slots, state, layer.states)
    back = read_state(page, slots, state.lengths, layer.key_dim, layer.states, bool(layer.window_size))
    for name, x, y in zip(DualState._fields, state, back, strict=True):
        assert x.dtype == y.dtype and torch.equal(x, y), name
    begun = read_state(page, torch.tensor([0, 3]), torch.tensor([0, 7]), layer.key_dim, layer.states, bool(layer.window_size))
    assert all(not x[0].any() for x in begun), "what another request left is not a new one's"
    assert torch.equal(begun.recurrent[1], state.recurrent[0])
    assert all(tensor[[0, 2, 4]].isnan().all() for tensor in whole), "pages of others stay as they are"
    for first, heads in ((0, 1), (3, 2)):
        assert all(tensor.isnan().all() for tensor in of_heads(whole, first, heads, layer.states)), "heads of other layers stay, too"


def test_the_converted_heads_of_each_layer():
    assert converted_heads(config_of()) == {2: (0, 1), 0: (0, 1)}
    heads = config_of(conversion_unit="head", conversion_order=[[0, 1], [2, 1], [2, 0]])
    assert converted_heads(heads) == {0: (1,), 2: (0, 1)}


def test_the_heads_of_each_rank():
    assert rank_heads((1, 4, 5), 8, 1, 0) == RankHeads((1, 4, 5), (0, 2, 3, 6, 7), 0, 3, 5)
    two = [RankHeads((1,), (0, 2, 3), 0, 2, 3), RankHeads((0, 1), (2, 3), 1, 2, 3)]
    assert [rank_heads((1, 4, 5), 8, 2, rank) for rank in (0, 1)] == two
    ranks = [rank_heads((1, 4, 5), 8, 4, rank) for rank in range(4)]
    assert [heads[:3] for heads in ranks] == [((1,), (0,), 0), ((), (0, 1), 1), ((0, 1), (), 1), ((), (0, 1), 3)]
    assert {heads[3:] for heads in ranks} == {(2, 2)}, "caches are the same on all"


@pytest.mark.parametrize("converted", [(1, 4, 5), (0, 1, 2, 3), (0, 1, 2, 3, 4, 5, 6, 7)], ids=str)
@pytest.mark.parametrize("ranks", [1, 2, 4])
@torch.no_grad()
def test_ranks_together_are_the_layer(converted, ranks):
    """Each with its part of the weights, chosen as `DSLAHeadsAttention` chooses."""
    torch.manual_seed(0)
    options = {"window_size": 4, "sink_tokens": 1, "gate_rank": 4}
    whole = DualStateAttention(2 * len(converted), len(converted), 8, **options)
    for x in whole.parameters():
        x.normal_()
    q, k, v = torch.randn(1, 21, 16, 8), torch.randn(1, 21, 8, 8), torch.randn(1, 21, 8, 8)
    queries = [2 * head + i for head in converted for i in range(2)]
    expected = q.clone()  # of kept heads, whose attention is not the point here, the queries
    expected[:, :, queries] = whole(q[:, :, queries], k[:, :, [*converted]], v[:, :, [*converted]])[0]
    found = []
    for rank in range(ranks):
        heads = rank_heads(converted, 8, ranks, rank)
        own_q, own_k, own_v = (x.chunk(ranks, 2)[rank] for x in (q, k, v))
        at, count = indices(heads, 2), len(heads.converted)
        assert len(at.kept) == heads.most_kept
        outputs = [own_q[:, :, at.kept_queries]] if heads.kept else []
        parts = {name: own_part(f"model.layers.3.self_attn.dsla.{name}", x, {3: heads}, 2) for name, x in whole.named_parameters()}
        if count:
            layer = DualStateAttention(2 * count, count, 8, **options)
            layer.load_state_dict(parts)
            outputs.insert(0, layer(own_q[:, :, at.converted_queries], own_k[:, :, at.converted], own_v[:, :, at.converted])[0])
        else:
            assert set(parts.values()) == {None}
        found.append(torch.cat(outputs, 2)[:, :, at.order])
    torch.testing.assert_close(torch.cat(found, 2), expected, rtol=0, atol=1e-5)


def test_weights_of_others_are_left_to_vllm():
    weight = torch.randn(6, 3)
    assert own_part("model.layers.3.self_attn.q_proj.weight", weight, {}, 2) is weight


def test_requests_of_like_lengths_are_read_together():
    lengths, seen = (3, 15, 16, 17, 40, 40, 300), (0, 0, 0, 0, 0, 7, 9)
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    prefills = [Prefill(end - n, end, before) for end, n, before in zip(ends, lengths, seen, strict=True)]
    assert [prefills[group] for group in alike(prefills)] == [prefills[:1], prefills[1:4], prefills[4:5], prefills[5:6], prefills[6:]]
    assert alike(()) == []


def test_layers_with_few_converted_heads_share_pages():
    assert places({4: 3, 0: 1, 7: 2, 2: 3, 5: 1}) == {
        4: Place(0, 0),
        2: Place(1, 0),
        7: Place(2, 0),
        0: Place(2, 2),
        5: Place(3, 0),
    }
    assert places({1: 2, 0: 2}) == {1: Place(0, 0), 0: Place(1, 0)}
