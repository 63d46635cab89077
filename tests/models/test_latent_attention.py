"""What docs/latent.md says of latent attention (MLA): its scores are those of one key-value head over the latent cache, which DSLA's layer
can attend to and fold as it is."""

import re
from pathlib import Path

import pytest
import torch
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, DynamicCache

from dsla_hf.core.attention import DualStateAttention
from dsla_hf.core.fold import fold
from dsla_hf.models.architectures import why_impossible
from dsla_hf.models.sizes import core_bytes
from dsla_kernels.checks import LARGEST_HEAD

PAGE = Path(__file__).resolve().parents[2] / "docs" / "latent.md"
SIZES = {
    "num_hidden_layers": 1,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 97,
    "kv_lora_rank": 12,
    "q_lora_rank": 20,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 10,
    "v_head_dim": 6,
    "first_k_dense_replace": 1,
    "initializer_range": 0.3,
}
TOKENS = 14


class Attended:
    """What the first attention of a small model had for some tokens: queries, latents, and its output before `o_proj`."""

    def __init__(self, kind, ids):
        torch.manual_seed(0)
        self.model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES), attn_implementation="eager").eval()
        self.attention = attention = self.model.model.layers[0].self_attn
        self.cache = DynamicCache(config=self.model.config)
        taken = {}
        handle = attention.o_proj.register_forward_pre_hook(lambda module, args: taken.update(o=args[0]))
        expand = attention.expand_kv
        attention.expand_kv = lambda c, r: taken.update(c=c, r=r) or expand(c, r)
        with torch.no_grad():
            self.model(ids, past_key_values=self.cache)
            handle.remove()
            self.c, self.r = taken["c"].transpose(1, 2), taken["r"].transpose(1, 2)  # [B, T, 1, rank], [B, T, 1, rotary]
            self.output = taken["o"].unflatten(-1, (4, SIZES["v_head_dim"]))
            keys, values = expand(taken["c"], taken["r"])
            self.keys, self.values = keys.transpose(1, 2), values.transpose(1, 2)
            up = attention.kv_b_proj.weight.view(4, SIZES["qk_nope_head_dim"] + SIZES["v_head_dim"], SIZES["kv_lora_rank"])
            self.key_up, self.value_up = up.split([SIZES["qk_nope_head_dim"], SIZES["v_head_dim"]], 1)
        self.scale = attention.scaling

    def queries(self):
        """As the base makes and rotates them, `[B, T, H, nope + rotary]`."""
        found = {}

        def look(module, query, key, value, mask, **kwargs):
            found["q"] = query
            return torch.zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None

        AttentionInterface.register("looks", look)
        self.model.set_attn_implementation("looks")
        with torch.no_grad():
            self.model(IDS)
        self.model.set_attn_implementation("eager")
        return found["q"].transpose(1, 2)

    def absorbed(self):
        """Queries `[B, T, H, rotary + rank]` and keys `[B, T, 1, rotary + rank]` of the one key-value head, rotated channels first."""
        q = self.queries()
        nope, rotary = q.split([SIZES["qk_nope_head_dim"], SIZES["qk_rope_head_dim"]], -1)
        return torch.cat([rotary, torch.einsum("bthn,hnr->bthr", nope, self.key_up)], -1), torch.cat([self.r, self.c], -1)


IDS = torch.arange(2, 2 + 2 * TOKENS).view(2, TOKENS)


@pytest.fixture(params=["deepseek_v3", "youtu"], scope="module")
def attended(request):
    return Attended(request.param, IDS)


def over_latents(attended):
    rank, rotary = SIZES["kv_lora_rank"], SIZES["qk_rope_head_dim"]
    return DualStateAttention(4, 1, rotary + rank, rank, scale=attended.scale, window_size=16, rotary_dim=rotary)


@torch.no_grad()
def test_one_head_over_latents_is_the_attention_of_the_base_inside_its_window(attended):
    q, k = attended.absorbed()
    o, _ = over_latents(attended)(q, k, attended.c)
    found = torch.einsum("bthr,hvr->bthv", o, attended.value_up)
    torch.testing.assert_close(found, attended.output, rtol=0, atol=1e-5 * float(attended.output.abs().max()))


@torch.no_grad()
def test_heads_over_expanded_keys_and_values_are_so_too(attended):
    layer = DualStateAttention(4, 4, attended.keys.shape[-1], attended.values.shape[-1], scale=attended.scale, window_size=16)
    o, _ = layer(attended.queries(), attended.keys, attended.values)
    torch.testing.assert_close(o, attended.output, rtol=0, atol=1e-5 * float(attended.output.abs().max()))


@torch.no_grad()
def test_the_latent_cache_folds_into_the_states_that_were_read(attended):
    """Windows are full and blocks gone into the states."""
    layer = over_latents(attended)
    layer.window_size, layer.sink_tokens = 4, 0
    q, k = attended.absorbed()
    state = layer(q, k, attended.c, output_state=True)[1]
    cached = attended.cache.layers[0]  # latents lie where others have keys, rotated keys where others have values
    keys = torch.cat([cached.values, cached.keys], -1)
    folded = fold(layer, keys, cached.keys).state
    for found, expected in zip(folded, state, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert state.recurrent.abs().max() > 0


def test_the_page_tells_the_sizes_of_the_configs():
    """Bytes of a layer and row, in bf16, and the length from which it takes fewer than the latent cache."""
    rows = re.findall(r"^\| `(\w+)` \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \|$", PAGE.read_text(), re.MULTILINE)
    assert len(rows) == 3
    for kind, *cells in rows:
        config = AutoConfig.for_model(kind)
        assert "latent attention (MLA" in why_impossible(config)
        rank, rotary = config.kv_lora_rank, config.qk_rope_head_dim
        token = 2 * (rank + rotary)
        with torch.device("meta"):
            latent = DualStateAttention(config.num_attention_heads, 1, rank + rotary, rank)
            expanded = DualStateAttention(
                config.num_attention_heads, config.num_attention_heads, config.qk_nope_head_dim + rotary, config.v_head_dim
            )
        held = (latent.window_size + latent.sink_tokens) * token + 8  # latents of window and sinks, in both ways
        states = [core_bytes(x, x.num_kv_heads, 2)["dsla_bytes"] for x in (latent, expanded)]
        states = [
            x - (core.window_size + core.sink_tokens) * core_bytes(core, core.num_kv_heads, 2)["softmax_bytes_per_token"] - 8 + held
            for x, core in zip(states, (latent, expanded), strict=True)
        ]
        assert [int(cell.replace(",", "")) for cell in cells] == [token, *states, *(-(-x // token) for x in states)], kind
        assert latent.key_dim > LARGEST_HEAD >= expanded.key_dim
