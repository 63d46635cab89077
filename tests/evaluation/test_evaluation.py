"""Perplexity and KL by level, and the size of the cache."""

import math

import pytest
import torch

from dsla_hf import cache_bytes
from dsla_hf.evaluation.levels import add_cache_sizes, cache_bytes_per_sequence, evaluate_levels
from dsla_hf.training.sharding import adapter_weights, initial_weights


def token_ids(batch=2, tokens=37):
    return torch.randint(3, 97, (batch, tokens))


def evaluated(model, data, levels):
    return evaluate_levels(model, data, levels, progress=False)


@torch.no_grad()
def row_by_hand(model, level, batches):
    """Sums over batches in fp64: a target counts if it and the token before it are real."""
    loss = kl = 0.0
    targets = tokens = 0
    model.eval()
    for batch in batches:
        ids = batch["input_ids"]
        real = batch.get("attention_mask", torch.ones_like(ids)).bool()
        model.set_level(0)
        teacher = model(**batch).logits.double().log_softmax(-1)
        model.set_level(level)
        student = model(**batch).logits.double().log_softmax(-1)
        for row in range(len(ids)):
            for t in range(ids.shape[1]):
                if real[row, t]:
                    kl += (teacher[row, t].exp() * (teacher[row, t] - student[row, t])).sum().item()
                    tokens += 1
                if t and real[row, t] and real[row, t - 1]:
                    loss -= student[row, t - 1, ids[row, t]].item()
                    targets += 1
    return {"level": level, "perplexity": math.exp(loss / targets), "kl": kl / tokens, "tokens": targets}


@pytest.fixture
def model(base_kind, tiny_model, adapter_model):
    return adapter_model(tiny_model(base_kind), level=3)


@pytest.fixture
def llama(tiny_model, adapter_model):
    """An adapter on a small Llama."""
    return adapter_model(tiny_model("llama"), level=3)


# --- quality ----------------------------------------------------------------------------------------------------


def test_level_0_is_the_model_itself(model):
    ids = token_ids()
    (row,) = evaluated(model, [ids], [0])
    with torch.no_grad(), model.disable_adapter():
        loss = model(ids, labels=ids).loss
    assert row["level"] == 0 and row["kl"] == 0 and row["tokens"] == 2 * 36
    assert row["perplexity"] == pytest.approx(loss.exp().item(), rel=1e-5)


def test_rows_by_hand(model):
    batches = [token_ids(2, 20), token_ids(1, 9)]
    rows = evaluated(model, batches, [4, 0, 2])
    for row, level in zip(rows, [4, 0, 2], strict=True):
        assert row == pytest.approx(row_by_hand(model, level, [{"input_ids": ids} for ids in batches]), rel=1e-4, abs=1e-7)
    assert rows[0]["kl"] > 0.01 and rows[2]["kl"] > 0.01


def test_masked_positions_do_not_count(model):
    mask = torch.ones(2, 16, dtype=torch.long)
    mask[0, :5], mask[1, 12:] = 0, 0
    batches = [{"input_ids": token_ids(2, 16), "attention_mask": mask}, {"input_ids": token_ids(1, 21)}]
    (row,) = evaluated(model, batches, [2])
    assert row["tokens"] == 10 + 11 + 20
    assert row == pytest.approx(row_by_hand(model, 2, batches), rel=1e-4)
    changed = {**batches[0], "input_ids": torch.where(mask.bool(), batches[0]["input_ids"], 50)}
    assert evaluated(model, [changed, batches[1]], [2])[0] == pytest.approx(row, rel=1e-5)


def test_data_and_levels_are_read_once(llama):
    batches = [token_ids(), token_ids(1, 9)]
    assert evaluated(llama, iter(batches), iter([1, 3])) == evaluated(llama, batches, [1, 3])


def test_order_of_the_levels_does_not_matter(llama):
    data = [token_ids()]
    assert evaluated(llama, data, [0, 1, 2, 3, 4]) == evaluated(llama, data, [4, 3, 2, 1, 0])[::-1]


def test_bfloat16_model(tiny_model, adapter_model):
    model, ids = adapter_model(tiny_model("llama").bfloat16()), token_ids()
    (row,) = evaluated(model, [ids], [2])
    assert row == pytest.approx(row_by_hand(model, 2, [{"input_ids": ids}]), rel=1e-3)


def test_dropout_plays_no_part(tiny_model, adapter_model):
    model, data = adapter_model(tiny_model("llama", attention_dropout=0.5)), [token_ids()]
    expected = evaluated(model.eval(), data, [0, 2])
    assert evaluated(model.train(), data, [0, 2]) == expected


def test_other_weights_are_measured_beside_its_own_which_stay_bit_for_bit(model):
    data, own = [token_ids(), token_ids(1, 20)], initial_weights(model)
    other = {name: weight + 0.1 * torch.randn_like(weight) for name, weight in own.items()}
    rows = evaluate_levels(model, data, [0, 1, 4], progress=False, untrained=other)
    assert all(torch.equal(weight, initial_weights(model)[name]) for name, weight in own.items())
    assert [{name: row[name] for name in ("level", "perplexity", "kl", "tokens")} for row in rows] == evaluated(model, data, [0, 1, 4])
    model.load_state_dict(other, strict=False)
    for row, expected in zip(rows[1:], evaluated(model, data, [1, 4]), strict=True):
        assert (row["untrained_perplexity"], row["untrained_kl"]) == (expected["perplexity"], expected["kl"])
        assert row["untrained_kl"] != row["kl"]
    assert "untrained_kl" not in rows[0]


def test_own_weights_are_put_back_after_an_error_too(llama):
    own = initial_weights(llama)
    with pytest.raises(RuntimeError, match="midway"), adapter_weights(llama, {name: 2 * weight for name, weight in own.items()}):
        raise RuntimeError("midway")
    assert all(torch.equal(weight, initial_weights(llama)[name]) for name, weight in own.items())
    with pytest.raises(ValueError, match="not the weights of this adapter"), adapter_weights(llama, {}):
        pass


@pytest.mark.parametrize("training", [True, False])
def test_level_and_mode_are_afterwards_what_they_were(llama, training):
    llama.train(training)
    evaluated(llama, [token_ids()], [0, 4])
    assert llama.get_level() == 3 and llama.training == training
    assert all(p.grad is None for p in llama.parameters())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fault", ["reading", "running", "level"])
def test_level_and_mode_are_what_they_were_after_an_error_too(llama, fault, training):
    def data():
        yield token_ids()
        if fault == "reading":
            raise OSError("the disk is gone")
        if fault == "running":
            yield torch.full((1, 5), 1000)  # no such token

    llama.train(training)
    with pytest.raises({"reading": OSError, "running": IndexError, "level": ValueError}[fault]):
        evaluated(llama, data(), [1, 5 if fault == "level" else 4])
    assert llama.get_level() == 3 and llama.training == training


def test_no_data_is_refused(llama):
    with pytest.raises(ValueError, match="evaluate_levels got no data"):
        evaluated(llama, [], [0])


@pytest.mark.parametrize("level", [5, -1])
def test_level_the_plan_does_not_have_is_refused(llama, level):
    with pytest.raises(ValueError, match=f"level.*{level}"):
        evaluated(llama, [token_ids()], [level])


def test_model_without_an_adapter_is_refused(tiny_model):
    with pytest.raises(ValueError, match="no active DSLA adapter"):
        evaluated(tiny_model("llama"), [token_ids()], [0])


# --- size of the cache ------------------------------------------------------------------------------------------


@torch.no_grad()
def bytes_of_a_real_cache(model, tokens):
    return cache_bytes(model(token_ids(1, tokens), use_cache=True).past_key_values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window_size, sink_tokens", [(0, 4), (8, 4), (16, 0), (16, 5)])
def test_bytes_are_those_of_a_real_cache(base_kind, window_size, sink_tokens, dtype, tiny_model, adapter_model):
    model = adapter_model(tiny_model(base_kind).to(dtype), window_size=window_size, sink_tokens=sink_tokens)
    for level in (0, 1, 3, 4):
        model.set_level(level)
        for tokens in (3, 8, 40):
            assert cache_bytes_per_sequence(model, tokens) == bytes_of_a_real_cache(model, tokens), (level, tokens)
    assert cache_bytes_per_sequence(model, 40) == cache_bytes_per_sequence(model, 1 << 20), "constant with every layer converted"


def test_bytes_with_float32_masters_over_a_bfloat16_base(tiny_model, adapter_model):
    model = adapter_model(tiny_model("llama").bfloat16(), level=2)
    for name, parameter in model.named_parameters():
        if "dsla_" in name:
            parameter.data = parameter.data.float()
    assert cache_bytes_per_sequence(model, 40) == bytes_of_a_real_cache(model, 40)


@pytest.mark.parametrize("level", [0, 1, 2])
def test_bytes_with_layers_outside_the_plan(tiny_model, adapter_model, level):
    model = adapter_model(tiny_model("llama"), conversion_order=[3, 1], level=level)
    assert cache_bytes_per_sequence(model, 40) == bytes_of_a_real_cache(model, 40)


def test_bytes_of_other_head_sizes(tiny_model, adapter_model):
    model = adapter_model(tiny_model("qwen3", num_key_value_heads=1, head_dim=16), level=2)
    assert cache_bytes_per_sequence(model, 40) == bytes_of_a_real_cache(model, 40)


def test_sequences_of_one_token_predict_nothing(tiny_model, adapter_model):
    with pytest.raises(ValueError, match="two tokens or more"):
        evaluate_levels(adapter_model(tiny_model("llama")), [torch.tensor([[5]])], [1])


def test_rows_of_heads_have_what_is_kept_and_bytes_at_three_lengths(tiny_model, adapter_model):
    model = adapter_model(tiny_model("llama"), conversion_unit="head", conversion_order=None, level=2)
    rows = evaluate_levels(model, [torch.randint(1, 97, (2, 24))], [0, 3, 8], progress=False)
    add_cache_sizes(model, rows)
    assert [(row["level"], row["kept"]) for row in rows] == [(0, 8), (3, 5), (8, 0)] and model.get_level() == 2
    for row in rows:
        model.set_level(row["level"])
        sizes = [cache_bytes_per_sequence(model, tokens) for tokens in (2048, 8192, 32768)]
        assert [row[name] for name in row if name.startswith("bytes")] == sizes == [row[f"bytes_{n}k"] for n in (2, 8, 32)]
        # A counter for each head is reckoned, 8 bytes, and there is one for each layer.
        assert cache_bytes_per_sequence(model, 100) == pytest.approx(bytes_of_a_real_cache(model, 100), abs=8 * 8)
    layers = adapter_model(tiny_model("llama"), level=2)
    (row,) = evaluate_levels(layers, [torch.randint(1, 97, (2, 24))], [1], progress=False)
    add_cache_sizes(layers, [row])
    assert list(row) == ["level", "perplexity", "kl", "tokens", "bytes_1k", "bytes_32k"]
