"""What the recipes are judged by beside the long-context tasks of `dsla_hf.evaluation`: text by document, interventions on the states,
raises in mid-text, what the states read. All deterministic; every text is held out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from dsla_hf.evaluation.next_tokens import next_token_losses
from dsla_hf.training.text import read_texts
from dsla_kernels import log_decays

# Sixteen stacked windows of 64 tokens reach 16 * 63 + 1 tokens back: nothing farther can come through windows alone.
WINDOW_REACH = 1009


def held_out_blocks(path: Path, tokenizer: Any, length: int, count: int) -> tuple[Tensor, list[int]]:
    """Up to `count` blocks `[N, length]`, none of them across two documents, taken evenly from the documents that are long
    enough; and the number of the document of each."""
    documents = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in read_texts(path)]
    long = [(i, ids) for i, ids in enumerate(documents) if len(ids) >= length]
    blocks, numbers = [], []
    for part in range(max((len(ids) // length for _, ids in long), default=0)):
        for i, ids in long:
            if len(blocks) < count and len(ids) >= (part + 1) * length:
                blocks.append(ids[part * length : (part + 1) * length])
                numbers.append(i)
    if not blocks:
        raise ValueError(f"{path} holds no document of {length} tokens")
    return torch.tensor(blocks), numbers


INTERVENTIONS = ("none", "no history", "no recency", "no states", "another document's states")


@torch.no_grad()
def intervened_losses(model: Any, blocks: Tensor, scored: int, intervention: str, batch_size: int = 16) -> Tensor:
    """Losses `[N, scored - 1]` of the end of each block, read after the states of all DSLA layers were changed."""
    losses = []
    for batch in blocks.split(batch_size):
        batch = batch.to(model.device)
        cache = DynamicCache(config=model.config)
        model(input_ids=batch[:, :-scored], past_key_values=cache, logits_to_keep=1)
        for layer in cache.layers:
            state = getattr(layer, "state", None)
            if state is None:
                continue
            if intervention == "another document's states":
                state.recurrent.copy_(state.recurrent.roll(1, 0))
            elif intervention != "none":
                state.recurrent[:, :, {"no history": slice(0, 1), "no recency": slice(1, 2), "no states": slice(0, 2)}[intervention]] = 0
        logits = model(input_ids=batch[:, -scored:], past_key_values=cache).logits
        losses.append(next_token_losses(logits, batch[:, -scored:]).cpu())
    return torch.cat(losses)


@torch.no_grad()
def raised_losses(model: Any, blocks: Tensor, plan: tuple[tuple[int, int], ...], set_level: Any, batch_size: int = 16) -> Tensor:
    """Losses `[N, T - 1]` of text that is read through one cache while the level rises: `plan` holds (level, until which token)."""
    losses = []
    for batch in blocks.split(batch_size):
        batch = batch.to(model.device)
        cache, parts, begin = DynamicCache(config=model.config), [], 0
        for level, end in plan:
            set_level(model, level)
            parts.append(model(input_ids=batch[:, begin:end], past_key_values=cache).logits)
            begin = end
        losses.append(next_token_losses(torch.cat(parts, 1), batch).cpu())
    return torch.cat(losses)


@torch.no_grad()
def state_reads(model: Any, cores: dict[int, Any], blocks: Tensor, bins: int = 32) -> dict[str, list[list[float]]]:
    """How much the last token reads from each earlier one out of each state, by layer: `[2, bins]` mean |weight| over rows and heads,
    as shares of all that is read; bin 0 is the farthest. The DSLA paper's recency-bias figure, for both states."""
    seen: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    hooks = [core.register_forward_pre_hook(lambda m, args, i=i: seen.__setitem__(i, args[:3])) for i, core in cores.items()]
    model(input_ids=blocks.to(model.device), use_cache=False, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    reads = {}
    for i, (q, k, v) in seen.items():
        core = cores[i]
        gate_logits, write_logits = core.gate_logits(v)
        log_decay = log_decays(gate_logits, core.key_dim, core.gate_normalizer, core.gate_lower_bound)
        decayed = (log_decay.flip(1).cumsum(1).flip(1) - log_decay).exp()  # from each token to the last
        written = k.float()[:, :, :, None] * (1 if write_logits is None else write_logits.sigmoid()[..., None]) * decayed
        last = q[:, -1].float().unflatten(1, (core.num_kv_heads, -1))
        weights = torch.einsum("bhrk,bthik->bihrt", last, written).abs() * core.mix().T.unflatten(1, (core.num_kv_heads, -1))[..., None]
        read = weights.mean((0, 2, 3))
        shares = (read / read.sum()).unflatten(1, (bins, -1)).sum(-1)
        reads[str(i)] = [[round(share, 5) for share in row] for row in shares.tolist()]
    return reads
