"""What tests of captured steps share."""

import torch

from dsla_hf import LevelProcessor
from dsla_hf.inference.graph import GraphDecoder
from dsla_hf.inference.recorder import CudaRecording

# Two texts, of which the first may be padded on the left.
IDS = torch.tensor([[5, 17, 31, 44, 9, 60, 61, 62, 3, 8, 12, 77], [9, 60, 5, 17, 31, 5, 60, 61, 62, 5, 17, 31]])
MASK = torch.ones_like(IDS)
MASK[0, :5] = 0


def check_captured_text(model, padded, highest, record=CudaRecording):
    """Texts that are raised twice while they are written, to level 2 and to the highest, are those of `generate`; the decoder."""
    ids = torch.randint(3, 97, (2, 40), device=model.device)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0 if padded else 1

    def policy(stats):
        return 0 if stats.tokens < 60 else 2 if stats.tokens < 80 else highest

    options = {"attention_mask": mask, "max_new_tokens": 80, "do_sample": False, "level_policy": policy}
    expected = model.generate(ids, **options)
    decoder = GraphDecoder(model, record=record)
    assert decoder.obstacle(**options) is None
    for _ in range(2):
        assert torch.equal(decoder.generate(ids, **options), expected)
    assert decoder.recorder.recordings and decoder.recorder.reason is None
    return decoder


def rising(stats):
    return 0 if stats.tokens < 20 else 2 if stats.tokens < 28 else 4


def rising_texts(model, recorder, padded, **options):
    """Two texts whose level is raised twice are those of `generate`, the second by the recordings of the first. Behind each: the decoder,
    what it gave, and what was expected."""
    mask = MASK if padded else torch.ones_like(MASK)
    options |= {"attention_mask": mask, "max_new_tokens": 30, "return_dict_in_generate": True}
    expected = model.generate(IDS, level_policy=rising, **options)
    decoder = recorder.decoder_of(model)
    assert decoder.obstacle(**options) is None
    for text in range(2):
        processor = LevelProcessor(model, rising)
        found = decoder.generate(IDS, level_policy=processor, **options)
        assert torch.equal(found.sequences, expected.sequences)
        assert [level for _, level in processor.history] == [0, 2, 4]
        if text == 0:
            recorded = recorder.recorded
        yield decoder, found, expected
    assert recorder.recorded == recorded and recorder.replayed
