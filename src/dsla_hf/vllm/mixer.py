"""The DSLA layer as vLLM runs one: where its attention was, over pages that vLLM's scheduler hands out.

To vLLM a page of states is a layer with a cache, whichever layers' states it holds, and so are the kept heads of a layer converted in part.
"""

from typing import Any

import torch
from torch import Tensor, nn
from vllm.forward_context import get_forward_context
from vllm.utils.torch_utils import direct_register_custom_op

from ..core.attention import DualStateAttention
from ..core.heads import HeadIndices, HeadSplit
from .pages import head_size, of_heads, read_state, write_state
from .state_page import StatePage, register


class DSLAMixer(DualStateAttention):
    """DSLA of the converted heads of an attention layer of vLLM.

    Args:
        config: of the hybrid, a `DSLAHybridConfig`.
        heads: the layer's converted KV heads, how many.
        scale: of the scores.
        prefix: the mixer's name in vLLM.
        page: what it keeps is there.
        first: the head of the page that is its own first.
    """

    def __init__(self, config: Any, heads: int, scale: float, prefix: str, page: StatePage, first: int) -> None:
        queries = config.num_attention_heads // config.num_key_value_heads
        super().__init__(queries * heads, heads, head_size(config), scale=scale, **config.get_dsla_config().mathematics())
        self.prefix, self.page, self.first = prefix, page, first
        register(prefix, self)

    def run(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        """Attend for every request of a step: q, out `[tokens, Hq, K]`, k, v `[tokens, Hkv, K]`, requests one behind the other, those
        with one new token first."""
        metadata = get_forward_context().attn_metadata
        if metadata is None:  # vLLM measures memory
            out.zero_()
            return
        own: Any = metadata[self.page.prefix]
        decodes, requests = own.num_decodes, own.num_decodes + own.num_prefills
        slots = own.state_indices_tensor.long()
        starts = own.query_start_loc.tolist()
        seen = (own.seq_lens[:requests] - own.query_start_loc.diff()[:requests]).long()
        if decodes:
            state = self._read(slots[:decodes], seen[:decodes])
            o, new = self(q[:decodes, None], k[:decodes, None], v[:decodes, None], state=state, output_state=True)
            self._write(slots[:decodes], new)
            out[:decodes] = o[:, 0]
        for i, before in enumerate(seen[decodes:].tolist(), start=decodes):
            one, tokens = slice(i, i + 1), slice(starts[i], starts[i + 1])
            state = self._read(slots[one], seen[one]) if before else None
            o, new = self(q[None, tokens], k[None, tokens], v[None, tokens], state=state, output_state=True, seen=before or None)
            self._write(slots[one], new)
            out[tokens] = o[0]

    def _cache(self) -> tuple[Tensor, ...]:
        return of_heads(self.page.kv_cache, self.first, self.num_kv_heads, self.states)

    def _read(self, slots: Tensor, lengths: Tensor) -> Any:
        return read_state(self._cache(), slots, lengths, self.key_dim, self.states, bool(self.window_size))

    def _write(self, slots: Tensor, state: Any) -> None:
        write_state(self._cache(), slots, state, self.states)


class DSLAAttention(nn.Module):
    """What `self.attn` of a converted layer is: the arguments and the output of vLLM's `Attention`, DSLA between them.

    Beside it the layer has the mixer as `dsla`, by the name that its weights have in a hybrid's checkpoint.
    """

    def __init__(self, mixer: DSLAMixer) -> None:
        super().__init__()
        self.prefix, self.key_dim = mixer.prefix, mixer.key_dim

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (x.reshape(x.shape[0], -1, self.key_dim) for x in (query, key, value))
        out = torch.zeros_like(q)
        torch.ops.vllm.dsla_attention(q, k, v, out, self.prefix)
        return out.flatten(1)


class DSLAHeadsAttention(nn.Module):
    """What `self.attn` of a layer converted in part is: vLLM's attention for kept heads, DSLA for the others.

    Args:
        split: which heads are which.
        kept: vLLM's attention of the kept heads.
        mixer: of the converted ones.
    """

    def __init__(self, split: HeadSplit, kept: nn.Module, mixer: DSLAMixer) -> None:
        super().__init__()
        self.kept_attention, self.dsla_attention, self.key_dim = kept, DSLAAttention(mixer), mixer.key_dim
        for name, heads in zip(HeadIndices.__annotations__, split.on(torch.get_default_device()), strict=True):
            self.register_buffer(name, heads, persistent=False)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (x.reshape(x.shape[0], -1, self.key_dim) for x in (query, key, value))

        def chosen(x: Tensor, heads: Any) -> Tensor:
            return x.index_select(1, heads).flatten(1)

        outputs = [
            attention(chosen(q, queries), chosen(k, kv_heads), chosen(v, kv_heads))
            for attention, queries, kv_heads in (
                (self.dsla_attention, self.converted_queries, self.converted),
                (self.kept_attention, self.kept_queries, self.kept),
            )
        ]
        return chosen(torch.cat(outputs, 1).view_as(q), self.order)


def _dsla_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, layer_name: str) -> None:
    get_forward_context().no_compile_layers[layer_name].run(q, k, v, out)


def _dsla_attention_fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, layer_name: str) -> None:
    return


# An operator that torch.compile does not look into: what a step computes depends on its requests.
direct_register_custom_op(op_name="dsla_attention", op_func=_dsla_attention, mutates_args=["out"], fake_impl=_dsla_attention_fake)
