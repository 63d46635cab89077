"""Alignment where heads are converted: subsets that are drawn anew in every step are what a layer converted in part gives."""

from collections import Counter
from dataclasses import fields

import pytest
import torch

from dsla_hf.models.adapter import dsla_layers
from dsla_hf.training.alignment import align_each, align_subset, draw_heads
from dsla_hf.training.arguments import CHECKPOINTING, DSLATrainingArguments
from dsla_hf.training.losses import alignment_sums
from dsla_hf.training.switches import output_projections
from dsla_hf.training.trainer import DSLATrainer

CHECKPOINTING = next(name for name in CHECKPOINTING if name in {field.name for field in fields(DSLATrainingArguments)})
IDS = torch.randint(3, 97, (4, 24), generator=torch.Generator().manual_seed(1))
DATA = [{"input_ids": ids} for ids in IDS]
HEADS = {"conversion_unit": "head", "conversion_order": None, "level": 0}


def trainer(model, folder, **options):
    settings = {"per_device_train_batch_size": 2, "max_steps": 2, "logging_steps": 1, "save_strategy": "no", "report_to": [], "seed": 5}
    settings |= {"disable_tqdm": True, "use_cpu": True, "stage": "alignment", "learning_rate": 0.0, **options}
    return DSLATrainer(model, DSLATrainingArguments(output_dir=str(folder), **settings), train_dataset=DATA)


def logged(run, name):
    return [entry[name] for entry in run.state.log_history if name in entry]


def of_base(model, index, ids=IDS):
    """What a layer's base attention takes and gives, and what its output projection takes."""
    layer, seen = dsla_layers(model)[index], {}
    hooks = [
        layer.register_forward_hook(lambda m, args, kwargs, out: seen.update(args=args, kwargs=kwargs, out=out[0]), with_kwargs=True),
        output_projections(layer)[0].register_forward_pre_hook(lambda m, args: seen.update(softmax=args[0])),
    ]
    with torch.no_grad(), model.disable_adapter():
        model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return layer, seen


# --- what is drawn ----------------------------------------------------------------------------------------------


def test_drawn_heads_are_a_pure_function_of_seed_step_and_layer():
    drawn = [draw_heads(7, step, layer, range(8)) for step in range(4) for layer in range(3)]
    torch.manual_seed(3)
    assert drawn == [draw_heads(7, step, layer, range(8)) for step in range(4) for layer in range(3)] and len(set(drawn)) > 4
    assert [draw_heads(0, 1, layer, range(4)) for layer in (2, 3)] == [(0,), (0, 2, 3)], "in every release"


def test_numbers_of_drawn_heads_are_even_but_for_the_full_set():
    counts = Counter(len(draw_heads(0, step, 0, [1, 3, 4])) for step in range(3000))
    assert counts[1] / 3000 == pytest.approx(0.7 / 3, abs=0.03) and counts[2] / 3000 == pytest.approx(0.7 / 3, abs=0.03)
    alone = Counter(heads for step in range(3000) if len(heads := draw_heads(0, step, 0, [1, 3, 4])) == 1)
    assert sorted(alone) == [(1,), (3,), (4,)] and min(alone.values()) > 180


# --- a layer ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gemma2", "phi3", "gpt_oss"])
def test_a_subset_is_the_layer_converted_in_part(kind, tiny_model, adapter_model):
    model = adapter_model(tiny_model(kind), **HEADS)
    layer, seen = of_base(model, 1)
    parameters = {name: p for name, p in layer.named_parameters() if p.requires_grad}

    def of(sums):
        loss = sums[0] / sums[1]
        return loss, dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values()), allow_unused=True), strict=True))

    mask = torch.ones_like(IDS)
    mask[:, :3] = 0
    expected, slopes = of(alignment_sums(layer.dsla_attention((1,))(*seen["args"], **seen["kwargs"])[0], seen["out"], mask))
    found, gradients = of(align_subset(layer, seen["args"], seen["kwargs"], seen["out"], mask, seen["softmax"], torch.tensor([0.0, 1.0])))
    torch.testing.assert_close(found, expected)
    for name, gradient in gradients.items():
        slope = torch.zeros_like(gradient) if slopes[name] is None else slopes[name]  # of a bias that is not in use
        torch.testing.assert_close(gradient, slope, atol=1e-6, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    assert expected > 0.01 and "forward" not in vars(output_projections(layer)[1])


def test_each_head_is_compared_by_itself(tiny_model, adapter_model):
    model = adapter_model(tiny_model("gpt_oss"), **HEADS)
    layer, seen = of_base(model, 1)
    projections = output_projections(layer)
    taken = []
    hook = projections[1].register_forward_pre_hook(lambda m, args: taken.append(args[0]))
    layer.dsla_attention()(*seen["args"], **seen["kwargs"])
    hook.remove()
    error, energy = torch.zeros(2)
    for head in (0, 1):
        only = torch.zeros(32)
        only[16 * head : 16 * head + 16] = 1
        base, own = ((x * only) @ projection.weight.T for x, projection in zip((seen["softmax"], taken[0]), projections, strict=True))
        more, of_it = alignment_sums(own, base)
        error, energy = error + more, energy + of_it
    sums = align_each(layer, seen["args"], seen["kwargs"], seen["out"], None, seen["softmax"], torch.ones(2))
    torch.testing.assert_close(torch.stack(sums), torch.stack([error, energy]))
    (gradient,) = torch.autograd.grad(sums[0], projections[1].bias)
    assert not gradient.any()


@pytest.mark.parametrize("kind", ["gemma2", "gpt_oss"])
def test_layers_that_slide_are_aligned_on_rows_longer_than_their_window(kind, tiny_model, adapter_model):
    model = adapter_model(tiny_model(kind), **{**HEADS, "conversion_order": [[2, 0], [2, 1]]})
    layer, seen = of_base(model, 2)
    window = layer.base_layer.sliding_window
    assert window < IDS.shape[1] and seen["kwargs"]["attention_mask"] is not None
    own = layer.dsla_attention()
    expected = own(*seen["args"], **{**seen["kwargs"], "attention_mask": None})[
        0
    ]  # a state reaches past the window: causal is all there is
    torch.testing.assert_close(own(*seen["args"], **seen["kwargs"])[0], expected)
    with pytest.raises(ValueError, match="a window that is not the model's"):
        own(*seen["args"], **{**seen["kwargs"], "attention_mask": seen["kwargs"]["attention_mask"] + narrower(window)})


def narrower(window):
    """An additive mask that hides what a window shorter by two tokens hides."""
    place = torch.arange(IDS.shape[1])
    return torch.where(place[:, None] - place >= window - 2, torch.finfo(torch.float32).min, 0.0)


# --- the trainer ------------------------------------------------------------------------------------------------


def by_hand(model, index, ids, heads):
    layer, seen = of_base(model, index, ids)
    with torch.no_grad():
        view = layer.dsla_attention(heads if len(heads) < 2 else None)
        error, energy = alignment_sums(view(*seen["args"], **seen["kwargs"])[0], seen["out"])
    return (error / energy).item()


def test_every_step_aligns_the_drawn_heads(tiny_model, adapter_model, tmp_path):
    model = adapter_model(tiny_model("llama"), **HEADS)
    run = trainer(model, tmp_path, max_steps=4, per_device_train_batch_size=4)  # every step has all rows
    run.train()
    for layer in range(4):
        expected = [by_hand(model, layer, IDS, draw_heads(5, step, layer, (0, 1))) for step in range(4)]
        assert logged(run, f"alignment/layer_{layer}") == pytest.approx(expected, rel=1e-4)
        assert layer or len(set(expected)) > 1
    assert model.get_level() == 0


def test_heads_that_the_plan_has_not_are_never_converted(tiny_model, adapter_model, tmp_path):
    model = adapter_model(tiny_model("llama"), conversion_unit="head", conversion_order=[[1, 0], [2, 1], [2, 0]], level=0)
    run = trainer(model, tmp_path, per_device_train_batch_size=4)
    run.train()
    assert logged(run, "alignment/layer_1") == pytest.approx([by_hand(model, 1, IDS, (0,))] * 2, rel=1e-4)
    assert run.evaluate(DATA)["eval_loss"] == pytest.approx((by_hand(model, 1, IDS, (0,)) + by_hand(model, 2, IDS, (0, 1))) / 2, rel=1e-4)


@pytest.mark.parametrize("unit", ["layer", "head"])
def test_all_heads_together_are_what_a_plan_of_layers_aligns(unit, tiny_model, adapter_model, tmp_path):
    model = adapter_model(tiny_model("llama"), conversion_unit=unit, conversion_order=None, level=0)
    run = trainer(model, tmp_path, max_steps=1, per_device_train_batch_size=4, alignment_heads="all" if unit == "head" else None)
    run.train()
    assert logged(run, "alignment/layer_3") == pytest.approx([by_hand(model, 3, IDS, (0, 1))], rel=1e-5)


@pytest.mark.parametrize("way", ["subsets", "each"])
def test_recomputed_layers_learn_the_same_and_views_do_not_pile_up(way, tiny_model, adapter_model, tmp_path):
    states = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = adapter_model(tiny_model("llama"), **HEADS)
        views = {layer: layer.dsla_attention() for layer in dsla_layers(model).values()}
        trainer(model, tmp_path, max_steps=3, learning_rate=1e-2, alignment_heads=way, **{CHECKPOINTING: recompute}).train()
        states.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})
        assert all(layer.dsla_attention() is view for layer, view in views.items()), "nothing is built anew for a draw"
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, msg=lambda text, name=name: f"{name}: {text}")


def test_unknown_ways_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"alignment_heads must be one of \['all', 'subsets', 'each'\], got 'some'"):
        DSLATrainingArguments(output_dir=str(tmp_path), alignment_heads="some", use_cpu=True)


# --- levels and lengths of steps --------------------------------------------------------------------------------


@pytest.mark.parametrize(("level", "units"), [("kept:3", 5), ("kept:50%", 4), ("25%", 2), ("6", 6), (7, 7)])
def test_train_level_is_what_set_level_takes(level, units, tiny_model, adapter_model, tmp_path):
    model = adapter_model(tiny_model("llama"), **HEADS)
    run = trainer(model, tmp_path, stage="logits", train_level=level, max_steps=1)
    assert run.step_level() == units
    run.train()
    assert logged(run, "level") == [units] and model.get_level() == 0


def test_levels_of_another_unit_are_refused(tiny_model, adapter_model, tmp_path):
    with pytest.raises(ValueError, match="kept:3"):
        trainer(adapter_model(tiny_model("llama")), tmp_path, stage="logits", train_level="kept:3")


def test_steps_have_the_lengths_in_turn_and_all_tokens(tiny_model, adapter_model, tmp_path, monkeypatch):
    model = adapter_model(tiny_model("llama"), **HEADS)
    run = trainer(model, tmp_path, stage="logits", max_steps=4, sequence_lengths=[12, 24], train_level=8)
    shapes, rows = [], []
    loss = run.compute_loss

    def watched(model, inputs, *args, **kwargs):
        shapes.append(tuple(inputs["input_ids"].shape))
        rows.append(inputs["input_ids"])
        return loss(model, inputs, *args, **kwargs)

    monkeypatch.setattr(run, "compute_loss", watched)
    run.train()
    assert shapes == [(4, 12), (2, 24)] * 2
    assert {tuple(row.tolist()) for row in rows[0].reshape(2, 24)} < {tuple(ids.tolist()) for ids in IDS}, "no token is lost or moved"


@pytest.mark.parametrize(
    ("lengths", "words"),
    [([7, 24], "no multiple of 7"), ([24, 48], "no multiple of 48"), *((x, "lengths of 1 or more") for x in ([0], [], [12.0], "24", 24))],
)
def test_lengths_that_do_not_fit_are_refused(lengths, words, tiny_model, adapter_model, tmp_path):
    model = adapter_model(tiny_model("llama"), **HEADS)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=words):
        trainer(model, tmp_path, sequence_lengths=lengths, learning_rate=0.1).train()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_padded_rows_are_not_cut(tiny_model, adapter_model, tmp_path):
    run = trainer(adapter_model(tiny_model("llama"), **HEADS), tmp_path, sequence_lengths=[12, 24])
    run.train_dataset = [{**row, "attention_mask": (torch.arange(24) < 20).long()} for row in DATA]
    with pytest.raises(ValueError, match="pack them"):
        run.train()
