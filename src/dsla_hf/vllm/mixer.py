"""The DSLA layer as vLLM runs one: where its attention was, over pages that vLLM's scheduler hands out.

To vLLM a page of states is a layer with a cache, whichever layers' states it holds, and so are the kept heads of a layer converted in part.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from vllm.forward_context import get_forward_context
from vllm.utils.torch_utils import direct_register_custom_op

from dsla_kernels import uses_triton

from ..core.attention import DualState, DualStateAttention
from .pages import head_size, of_heads, read_state, write_state
from .prefills import Prefill, alike
from .ranks import RankHeads, indices
from .state_page import StatePage, StatePageMetadata, register

# By this name vLLM knows the operator: torch.compile does not look into it, and graphs of its pieces end before it.
OPERATOR = "vllm::dsla_attention"


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
        of_page = page.parts[0][0][0 if self.states else 1]
        own = torch.arange(first, first + heads, dtype=torch.int32, device=torch.get_default_device()) if heads < of_page else None
        self.register_buffer("page_heads", own, persistent=False)

    def run(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        """Attend for every request of a step: q, out `[tokens, Hq, K]`, k, v `[tokens, Hkv, K]`, requests one behind the other, those
        with one new token first."""
        metadata = get_forward_context().attn_metadata
        if metadata is None:  # vLLM measures memory
            out.zero_()
            return
        own: StatePageMetadata = metadata[self.page.prefix]
        if own.num_decodes:
            tokens = slice(own.num_decodes)
            self._decode(q[tokens, None], k[tokens, None], v[tokens, None], out[tokens, None], own.pages, own.lengths)
        slots = own.state_indices_tensor[own.num_decodes :]
        for requests in alike(own.prefills):
            self._prefill(q, k, v, out, own.prefills[requests], slots[requests])

    def _decode(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, pages: Tensor, lengths: Tensor) -> None:
        """One token of each request; where kernels run, in the pages themselves and without a look at what the device has."""
        if uses_triton(q, v):
            cache = iter(self.page.kv_cache)
            nothing = k.new_empty(len(pages), 0)
            recurrent = next(cache) if self.states else nothing
            window_k, window_v = (*cache,) or (nothing, nothing)
            state = DualState(recurrent, window_k, window_v, lengths)
            options = {"in_place": True, "counts": False, "state_heads": self.page_heads, "pages": pages, "out": out}
            self(q, k, v, state=state, **options)
            return
        real = pages >= 0
        slots = pages[real].long()
        state = self._read(slots, lengths[real])
        o, new = self(q[real], k[real], v[real], state=state, output_state=True)
        self._write(slots, new)
        out[real] = o

    def _prefill(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, prefills: tuple[Prefill, ...], slots: Tensor) -> None:
        """Some requests at once, as rows; a single one without padding."""
        slots = slots.long()
        seen = [prefill.seen for prefill in prefills]
        state = self._read(slots, torch.tensor(seen, device=q.device)) if any(seen) else None
        if len(prefills) == 1:
            tokens = slice(*prefills[0][:2])
            o, new = self(*(x[None, tokens] for x in (q, k, v)), state=state, output_state=True, seen=seen[0] or None)
            out[tokens] = o[0]
        else:
            lengths = [prefill.end - prefill.start for prefill in prefills]
            first, last = prefills[0].start, prefills[-1].end
            rows = [pad_sequence(x[first:last].split(lengths), batch_first=True) for x in (q, k, v)]
            real = torch.arange(max(lengths), device=q.device) < torch.tensor(lengths, device=q.device)[:, None]
            o, new = self(*rows, padding_mask=real, padding_at_end=True, state=state, output_state=True)
            out[first:last] = o[real]
        self._write(slots, new)

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
        out = torch.empty_like(q)
        torch.ops.vllm.dsla_attention(q, k, v, out, self.prefix)
        return out.flatten(1)


class DSLAHeadsAttention(nn.Module):
    """What `self.attn` of a layer converted in part is: vLLM's attention for kept heads, DSLA for the others.

    Args:
        heads: which of the rank's are which.
        queries: query heads that read a KV head.
        kept: vLLM's attention, of as many kept heads as the rank with the most of them has.
        mixer: of the converted ones; None where the rank has none.
    """

    def __init__(self, heads: RankHeads, queries: int, kept: Any, mixer: DSLAMixer | None) -> None:
        super().__init__()
        self.kept_attention, self.key_dim = kept, kept.head_size
        self.dsla_attention = None if mixer is None else DSLAAttention(mixer)
        self.keeps = bool(heads.kept)
        places = indices(heads, queries)
        for name in ("converted", "kept", "converted_queries", "kept_queries", "order"):
            self.register_buffer(name, getattr(places, name).to(torch.get_default_device()), persistent=False)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (x.reshape(x.shape[0], -1, self.key_dim) for x in (query, key, value))

        def chosen(x: Tensor, heads: Any) -> Tensor:
            return x.index_select(1, heads).flatten(1)

        outputs = []
        if self.dsla_attention is not None:
            queries, kv_heads = self.converted_queries, self.converted
            outputs.append(self.dsla_attention(chosen(q, queries), chosen(k, kv_heads), chosen(v, kv_heads)))
        if self.keeps:
            queries, kv_heads = self.kept_queries, self.kept
            outputs.append(self.kept_attention(chosen(q, queries), chosen(k, kv_heads), chosen(v, kv_heads)))
        return chosen(torch.cat(outputs, 1).view(len(q), -1, self.key_dim), self.order)


def _dsla_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, layer_name: str) -> None:
    get_forward_context().no_compile_layers[layer_name].run(q, k, v, out)


def _dsla_attention_fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, layer_name: str) -> None:
    return


# An operator that torch.compile does not look into: what a step computes depends on its requests.
direct_register_custom_op(op_name="dsla_attention", op_func=_dsla_attention, mutates_args=["out"], fake_impl=_dsla_attention_fake)
