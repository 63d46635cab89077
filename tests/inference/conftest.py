"""Fixtures of the tests of recorded steps."""

import pytest

import dsla_hf.inference.recorder
from dsla_hf.core.cache import DSLACacheLayer
from dsla_hf.inference.graph import GraphDecoder, PlainRecording, dsla_attention_of
from dsla_hf.models.decoder import decoder_layers


def addresses(decoder):
    """Where a step reads and writes; of weights those that a level of heads picks."""
    space = decoder.workspace
    tensors = [space.tokens, space.positions, space.mask, space.logits]
    for layer in (*space.linear.values(), *space.beside.values()):
        tensors += [x for name in ("conv_states", "recurrent_states") for x in getattr(layer, name, {}).values() if x is not None]
    for layer in space.layers():
        if layer in space.linear.values():
            continue
        tensors += [*layer.state, layer.tokens] if isinstance(layer, DSLACacheLayer) else [layer.keys, layer.values]
    for layer in decoder_layers(decoder.causal_lm):
        attention = dsla_attention_of(layer)
        if attention is not None and attention.split is not None:
            linears = [x.weight for name, x in attention.named_modules() if name.endswith(("q_proj", "o_proj"))]
            tensors += [*linears, *attention.converted_core().parameters(), *attention.split.on(linears[0].device)]
    return [x.data_ptr() for x in tensors]


@pytest.fixture
def recorder():
    """Records as a CUDA graph does, but runs the step: fails where a tensor of the cache or a buffer has moved."""

    class Recorder:
        def __init__(self):
            self.recorded, self.replayed, self.decoder = 0, 0, None

        def __call__(self, step, pool):
            self.recorded += 1
            places = addresses(self.decoder)
            plain = PlainRecording(step)

            class Recording:
                def replay(_):
                    self.replayed += 1
                    assert addresses(self.decoder) == places, "a graph would read and write at the old place"
                    plain.replay()

            return Recording()

        def decoder_of(self, model, **options):
            self.decoder = GraphDecoder(model, record=self, **options)
            return self.decoder

    return Recorder()


@pytest.fixture
def small_views(monkeypatch):
    """Steps are shown so few places at first that short texts pass several sizes."""
    monkeypatch.setattr(dsla_hf.inference.recorder, "SMALLEST_SHOWN", 16)
