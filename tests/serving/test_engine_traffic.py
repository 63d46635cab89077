"""Random traffic: chats that go on, prompts that begin alike, levels that move, little memory, cancels and drafts, all at a time. Each
text is the one that its own level history gives without an engine."""

import itertools
import random

import pytest
import torch
from engine_texts import Ear, assert_empty, options
from transformers import DynamicCache

from dsla_hf.inference.recorder import PlainRecording
from dsla_hf.serving.engine.engine import Engine

HEADS = {"conversion_unit": "head", "conversion_order": [[1, 0], [3, 1], [0, 1], [3, 0], [2, 0], [1, 1], [2, 1], [0, 0]]}
UNITS = {"layers": {}, "heads": HEADS, "window": HEADS | {"states": False}}
NEAR_TIE = 1e-3  # of logits: other pieces of a prompt are other orders of addition


def behind(model, request):
    """How far below the greatest logit the tokens of a text are at most, read as its history says."""
    text, start, cache, found = request.text, len(request.prompt), DynamicCache(config=model.config), []
    bounds = [(first, level) for first, level in request.history if first < len(text) - 1]
    for (first, level), (end, _) in zip(bounds, [*bounds[1:], (len(text) - 1, None)], strict=True):
        model.set_level(level)
        pieces = [first, *range(max(first + 1, start - 1), end), end] if first < end else [end]
        for begin, stop in itertools.pairwise(pieces):
            with torch.no_grad():
                out = model(input_ids=torch.tensor([text[begin:stop]]), past_key_values=cache, use_cache=True)
            found.append(out.logits[0])
    logits = torch.cat(found)[start - 1 :]
    chosen = torch.tensor(text[start:])[:, None]
    assert len(logits) == len(chosen)
    return float((logits.amax(-1, keepdim=True) - logits.gather(1, chosen)).max())


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
@pytest.mark.parametrize("unit", UNITS)
def test_every_text_is_that_of_its_levels_alone(tiny_model, adapter_model, unit, seed):
    model = adapter_model(tiny_model("llama"), **UNITS[unit]).requires_grad_(False)
    draws, most = random.Random(f"{unit} {seed}"), model.level_sizes()["max_level"]
    level = [0]
    sizes = {"slots": 3, "chunk": draws.choice([4, 16]), "block_size": draws.choice([4, 8]), "max_tokens": 128}
    sizes |= {"kv_bytes": draws.choice([2**16, 2**17]), "snapshot_bytes": 2**17, "lower_prefixes": seed == 1}
    sizes |= [{}, {"draft_level": most, "draft_tokens": 3}, {"draft_lookup": True, "draft_tokens": 3}][seed]
    engine = Engine(model, lambda stats: level[0], options(**sizes), record=PlainRecording if seed else None)
    begins = [[draws.randrange(2, 97) for _ in range(length)] for length in (9, 30, 45)]
    ears, checked = [], 0
    for step in range(150):
        if draws.random() < 0.25 and step < 110:
            begin = draws.choice([*begins, *(ear.request.text[:70] for ear in ears[-4:])])
            begin = begin[: draws.randint(1, len(begin))] if draws.random() < 0.3 else begin
            ears.append(Ear())
            new = [draws.randrange(2, 97) for _ in range(draws.randint(1, 6))] if draws.random() < 0.5 else begin[:6]
            pinned = draws.choice(engine.pinnable) if draws.random() < 0.2 else None
            ears[-1].request = engine.submit(begin + new, draws.randint(1, 10), ears[-1], level=pinned)
        if draws.random() < 0.08:
            level[0] = draws.randint(0, most)
        if ears and draws.random() < 0.05:
            engine.cancel(draws.choice(ears).request)
        engine.step()
    while engine.step() or engine.busy:
        pass
    for ear in ears:
        assert ear.error is None
        if ear.request.tokens:
            assert behind(model, ear.request) < NEAR_TIE, (ear.request.number, ear.request.history)
            checked += 1
    assert_empty(engine)
    assert checked > 10 and engine.prefix_hits > 0 and engine.reuse.snapshots.evicted + len(engine.reuse.snapshots) > 0
    assert engine.drafts is None or engine.drafts.rounds > 0
    wrong = next(ear.request for ear in ears if ear.request.tokens)
    wrong.tokens[0] = (wrong.tokens[0] + 1) % 97
    assert behind(model, wrong) > NEAR_TIE, "another token would be seen"
