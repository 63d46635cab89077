"""The DSLA layer as vLLM runs one: where its attention was, over pages that vLLM's scheduler hands out."""

from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from ..core.attention import DualStateAttention
from .pages import head_size, page_parts, read_state, write_state


class DSLAMixer(DualStateAttention, MambaBase):
    """Takes the place of `self.attn` in an attention layer of vLLM, under the same name.

    Args:
        config: of the hybrid, a `DSLAHybridConfig`.
        scale: of the scores.
        prefix: the layer's name in vLLM.
    """

    # Its metadata are lengths and slots alone, decodes before prefills.
    mamba_type = MambaAttentionBackendEnum.LINEAR

    def __init__(self, config: Any, scale: float, prefix: str) -> None:
        size = head_size(config)
        mathematics = config.get_dsla_config().mathematics()
        super().__init__(config.num_attention_heads, config.num_key_value_heads, size, scale=scale, **mathematics)
        vllm_config = get_current_vllm_config()
        self.prefix = prefix
        self.parts = page_parts(config, vllm_config.model_config.dtype)
        vllm_config.compilation_config.static_forward_context[prefix] = self
        self.kv_cache: tuple[Tensor, ...] = (torch.tensor([]),)  # vLLM puts its own here

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        return tuple(shape for shape, _ in self.parts)

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return tuple(dtype for _, dtype in self.parts)

    def run(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        """Attend for every request of a step: q, out `[tokens, Hq, K]`, k, v `[tokens, Hkv, K]`, requests one behind the other, those
        with one new token first."""
        metadata = get_forward_context().attn_metadata
        if metadata is None:  # vLLM measures memory
            out.zero_()
            return
        own: Any = metadata[self.prefix]
        decodes, requests = own.num_decodes, own.num_decodes + own.num_prefills
        if own.num_decode_tokens != decodes:
            raise NotImplementedError("vLLM's speculative decoding is not supported with DSLA hybrids: leave --speculative-config out")
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

    def _read(self, slots: Tensor, lengths: Tensor) -> Any:
        return read_state(self.kv_cache, slots, lengths, self.key_dim, self.states, bool(self.window_size))

    def _write(self, slots: Tensor, state: Any) -> None:
        write_state(self.kv_cache, slots, state, self.states)


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


def _dsla_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, layer_name: str) -> None:
    get_forward_context().no_compile_layers[layer_name].run(q, k, v, out)


def _dsla_attention_fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, layer_name: str) -> None:
    return


# An operator that torch.compile does not look into: what a step computes depends on its requests.
direct_register_custom_op(op_name="dsla_attention", op_func=_dsla_attention, mutates_args=["out"], fake_impl=_dsla_attention_fake)
