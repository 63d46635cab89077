"""Drafts of texts that begin with what others have left, and leave something themselves: all are what they are without either."""

import random

import pytest
from engine_texts import Ear, alone, assert_empty, options, prompts, run

from dsla_hf.serving.engine.engine import Engine

PREFIX = prompts(1, 32, 32, seed=7)[0]


@pytest.fixture
def tuned(tiny_model, adapter_model):
    return adapter_model(tiny_model("llama"))


@pytest.mark.parametrize("level", [0, 2])
@pytest.mark.parametrize("drafts", [{"draft_level": 4}, {"draft_lookup": True}])
@pytest.mark.parametrize("kind", ["layers", "heads"])
def test_chats_with_drafts(tuned, head_model, level, drafts, kind):
    model = tuned if kind == "layers" else head_model().requires_grad_(False)
    engine = Engine(model, lambda stats: level, options(chunk=16, snapshot_bytes=2**18, draft_tokens=3, **drafts))
    numbers, texts = random.Random(5), [PREFIX, PREFIX[:21], PREFIX[:9]]
    for _ in range(8):
        ears = []
        for text in texts:
            ear = Ear()
            ear.request = engine.submit(text, numbers.randint(1, 14), ear)
            ears.append(ear)
        run(engine)
        for ear in ears:
            assert ear.tokens == alone(model, ear.request.prompt, ear.request.max_tokens, level)
        texts = [ear.request.text[:150] + prompts(1, 1, 9, seed=numbers.random())[0] for ear in ears]
        assert_empty(engine)
    assert engine.drafts.rounds > 5 and engine.prefix_hits > 500
    if level:
        assert all(ear.request.reused > len(ear.request.prompt) - 11 for ear in ears), "what is new alone is read"
