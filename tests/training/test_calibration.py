"""Where a fresh layer's states start: as large as the attention that they replace."""

import pytest
import torch

from dsla_hf import set_level
from dsla_hf.models.adapter import dsla_layers
from dsla_hf.training.arguments import DSLATrainingArguments
from dsla_hf.training.calibration import BIASES, SLACK, SMALLEST, match_outputs
from dsla_hf.training.trainer import DSLATrainer

IDS = torch.randint(3, 97, (2, 48), generator=torch.Generator().manual_seed(0))


def make(tiny_model, adapter_model, **config):
    torch.manual_seed(0)
    base = tiny_model("llama")
    with torch.no_grad():  # values, and so attention outputs, far from 1, and not alike in all channels
        for layer in base.model.layers:
            layer.self_attn.v_proj.weight.mul_(torch.logspace(-2, 0, len(layer.self_attn.v_proj.weight))[:, None])
    model = adapter_model(base, **config)
    with torch.no_grad():
        for core in cores(model).values():
            if core.states:
                core.reset_parameters()
    return model


def cores(model):
    return {i: layer.dsla_core[layer.adapter_name] for i, layer in dsla_layers(model).items()}


@torch.no_grad()
def attention_outputs(model):
    """Of each layer of the base, by channel `[Hq * V]`: the root mean square."""
    found, hooks = {}, []
    for i, layer in dsla_layers(model).items():
        hooks.append(
            layer.base_layer.o_proj.register_forward_pre_hook(lambda m, args, i=i: found.update({i: args[0].square().mean((0, 1)).sqrt()}))
        )
    with model.disable_adapter():
        model(IDS, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


@torch.no_grad()
def errors(model):
    """Of each layer's output beside the base's, over the energy of that."""
    found = {}

    def compare(layer, args, kwargs, output):
        own, base = layer.dsla_attention()(*args, **kwargs)[0], output[0]
        found[layer.layer_idx] = ((own - base).square().sum() / base.square().sum()).item()

    hooks = [layer.register_forward_hook(compare, with_kwargs=True) for layer in dsla_layers(model).values()]
    with model.disable_adapter():
        model(IDS, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


def test_behind_a_window_channels_start_as_large_as_those_of_the_attention(tiny_model, adapter_model):
    model = make(tiny_model, adapter_model, window_size=8)
    expected = attention_outputs(model)
    assert match_outputs(model, {"input_ids": IDS}) == list(expected)
    for i, core in cores(model).items():
        torch.testing.assert_close(core.norm_weight.flatten(), expected[i].clamp(min=SMALLEST), rtol=1e-5, atol=1e-7)


def test_states_open_no_wider_than_helps(tiny_model, adapter_model):
    """Of all starts each head has the widest with which it is as near to the attention as with any."""
    model = make(tiny_model, adapter_model, window_size=8)
    with torch.no_grad():
        for layer in dsla_layers(model).values():
            for part in (layer.base_layer, layer.dsla_attention()):
                part.q_proj.weight.mul_(8)  # sharp scores, which states cannot imitate
    match_outputs(model, {"input_ids": IDS})
    layers, chosen = dsla_layers(model), {i: core.state_bias.clone() for i, core in cores(model).items()}

    def by_head():
        found = {i: [] for i in layers}
        projections = {i: (layer.base_layer.o_proj, layer.dsla_attention().o_proj) for i, layer in layers.items()}
        hooks = [p.register_forward_pre_hook(lambda m, args, i=i: found[i].append(args[0])) for i in layers for p in projections[i]]
        hooks += [
            layer.register_forward_hook(lambda m, args, kwargs, _: m.dsla_attention()(*args, **kwargs) and None, with_kwargs=True)
            for layer in layers.values()
        ]
        with torch.no_grad(), model.disable_adapter():
            model(IDS, use_cache=False)
        for hook in hooks:
            hook.remove()
        return {i: (own - base).square().unflatten(-1, (len(chosen[i]), -1)).mean((0, 1, 3)) for i, (base, own) in found.items()}

    errors = []
    for bias in BIASES:
        for core in cores(model).values():
            core.state_bias.data.fill_(bias)
        errors.append(by_head())
    for i, biases in chosen.items():
        grid = torch.stack([found[i] for found in errors])
        for head, bias in enumerate(biases.tolist()):
            enough = (1 + SLACK) * grid[:, head].min()
            place = BIASES.index(bias)
            assert grid[place, head] <= enough * (1 + 1e-5) and (grid[:place, head] > enough * (1 - 1e-5)).all()
    assert any((biases < 0).any() for biases in chosen.values())  # or 0 were as good


def test_a_text_within_the_window_moves_no_bias(tiny_model, adapter_model):
    model = make(tiny_model, adapter_model, window_size=64)
    match_outputs(model, {"input_ids": IDS})
    assert all((core.state_bias == 0).all() for core in cores(model).values())


def test_without_one_the_output_starts_no_further_off_than_nothing_would_be(tiny_model, adapter_model):
    model = make(tiny_model, adapter_model, window_size=0)
    before = errors(model)
    match_outputs(model, {"input_ids": IDS})
    after = errors(model)
    assert max(before.values()) > 10  # or this test shows nothing
    assert max(after.values()) < 1.01


def test_what_was_trained_or_has_no_states_stays(tiny_model, adapter_model):
    model = make(tiny_model, adapter_model, window_size=8)
    with torch.no_grad():
        cores(model)[1].norm_weight[0, 0] = 0.7
    kept = cores(model)[1].norm_weight.clone()
    assert 1 not in match_outputs(model, {"input_ids": IDS})
    assert torch.equal(cores(model)[1].norm_weight, kept)
    assert match_outputs(model, {"input_ids": IDS}) == []  # nothing is fresh any more
    alone = make(tiny_model, adapter_model, window_size=8, states=False)
    assert match_outputs(alone, {"input_ids": IDS}) == []


@pytest.mark.parametrize(("stage", "matched"), [("alignment", True), ("logits", False)])
def test_alignment_begins_with_it(tmp_path, tiny_model, adapter_model, stage, matched):
    model = make(tiny_model, adapter_model, window_size=8)
    set_level(model, 1)
    args = DSLATrainingArguments(
        output_dir=str(tmp_path), stage=stage, max_steps=1, learning_rate=0.0, per_device_train_batch_size=2, use_cpu=True, report_to=[]
    )
    DSLATrainer(model, args, train_dataset=[{"input_ids": row} for row in IDS]).train()
    assert bool((cores(model)[0].norm_weight != 1).any()) == matched


@pytest.mark.parametrize("window", [0, 8])
def test_batches_of_a_step_count_as_one(tiny_model, adapter_model, window):
    """Also where they have other numbers of tokens, or none that counts."""
    whole, parts = (make(tiny_model, adapter_model, window_size=window) for _ in range(2))
    ids = torch.cat([IDS, IDS.flip(1)])
    mask = torch.ones_like(ids)
    mask[2, -5:] = 0
    hidden = {"input_ids": ids[:1], "attention_mask": torch.zeros_like(ids[:1])}
    cut = [{"input_ids": ids[a:b], "attention_mask": mask[a:b]} for a, b in ((0, 1), (1, 3), (3, 4))]
    assert match_outputs(whole, {"input_ids": ids, "attention_mask": mask}) == match_outputs(parts, [*cut[:2], hidden, *cut[2:]])
    moved = False
    for i, core in cores(whole).items():
        for name, value in core.named_parameters():
            torch.testing.assert_close(cores(parts)[i].get_parameter(name), value, rtol=1e-4, atol=1e-6)
            moved = moved or (name == "norm_weight" and bool((value != 1).any()))
    assert moved


def test_accumulated_gradients_begin_with_all_batches_of_the_first_step(tmp_path, tiny_model, adapter_model):
    """As one large batch, which they stand for."""
    found, texts = [], torch.cat([IDS, IDS.flip(1), IDS.roll(3, 1), IDS.roll(7, 1)])
    for rows, steps in ((4, 1), (1, 4)):
        model = make(tiny_model, adapter_model, window_size=8)
        args = DSLATrainingArguments(
            output_dir=str(tmp_path / str(rows)),
            stage="alignment",
            max_steps=2,
            learning_rate=0.0,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=steps,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
        )
        trainer = DSLATrainer(model, args, train_dataset=[{"input_ids": row} for row in texts])
        trainer.train()
        assert trainer._first_batches == []
        found.append({i: core.norm_weight.detach().clone() for i, core in cores(model).items()})
    for i, weight in found[0].items():
        torch.testing.assert_close(found[1][i], weight, rtol=1e-4, atol=1e-6)
    assert any((weight != 1).any() for weight in found[0].values())


def test_a_gradient_that_is_not_finite_changes_nothing(tmp_path, tiny_model, adapter_model):
    """Behind a loss that is: the optimizer would make every weight what it is."""
    model = make(tiny_model, adapter_model, window_size=8)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    broken = next(p for name, p in model.named_parameters() if "layers.2." in name and p.requires_grad)
    broken.register_hook(lambda gradient: gradient * float("inf"))
    args = DSLATrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, use_cpu=True, report_to=[], save_strategy="no"
    )
    trainer = DSLATrainer(model, args, train_dataset=[{"input_ids": row} for row in IDS.repeat(4, 1)])
    with pytest.raises(FloatingPointError, match="the gradient of step 1 is not finite"):
        trainer.train()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("window", [0, 8])
@pytest.mark.parametrize("left", [True, False])
def test_padding_counts_for_nothing(tiny_model, adapter_model, window, left):
    plain, padded = (make(tiny_model, adapter_model, window_size=window) for _ in range(2))
    pad, real = torch.zeros(2, 20, dtype=torch.long), torch.ones_like(IDS)
    ids, mask = (torch.cat([pad, x] if left else [x, pad], 1) for x in (IDS, real))
    assert match_outputs(plain, {"input_ids": IDS}) == match_outputs(padded, {"input_ids": ids, "attention_mask": mask})
    for i, core in cores(plain).items():
        for name, value in core.named_parameters():
            torch.testing.assert_close(cores(padded)[i].get_parameter(name), value)


@pytest.mark.parametrize("window", [0, 8])
def test_a_base_that_gives_nothing_finite_spoils_no_weight(tiny_model, adapter_model, window):
    model = make(tiny_model, adapter_model, window_size=window)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        model.get_base_model().model.embed_tokens.weight[IDS[0, 3]] = float("nan")
    assert match_outputs(model, {"input_ids": IDS}) == []
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if p.requires_grad)
