"""Models whose levels count heads, and ways through them."""

import torch

# Of four layers with two KV heads each: layers 2, 0 and 3 are split at some levels, 3 is whole from level 4 on.
ORDER = [[2, 0], [0, 1], [3, 0], [3, 1], [1, 1], [0, 0], [2, 1], [1, 0]]
VOCABULARY = 97


def text(batch=2, tokens=40):
    """Token ids without the padding token 0."""
    return torch.randint(2, VOCABULARY, (batch, tokens))


def positions(mask):
    """As `generate` makes them."""
    return (mask.long().cumsum(-1) - 1).clamp_min(0)


@torch.no_grad()
def full(model, ids, mask=None, **options):
    """Logits of one call without a cache."""
    position_ids = None if mask is None else positions(mask)
    return model(ids, attention_mask=mask, position_ids=position_ids, use_cache=False, **options).logits


@torch.no_grad()
def pieces(model, ids, sizes, cache, mask=None, before=()):
    """Logits of calls of these sizes that share a cache; `before`: what is done before the call of a number."""
    logits, start = [], 0
    for number, size in enumerate(sizes):
        dict(before).get(number, lambda: None)()
        piece, options = slice(start, start + size), {}
        if mask is not None:
            options = {"attention_mask": mask[:, : piece.stop], "position_ids": positions(mask)[:, piece]}
        logits.append(model(ids[:, piece], past_key_values=cache, **options).logits)
        start += size
    assert start == ids.shape[1]
    return torch.cat(logits, 1)


def assert_close(found, expected, atol=1e-4):
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def kinds(cache):
    """The classes of a cache's layers."""
    return [type(layer).__name__ for layer in cache.layers]
