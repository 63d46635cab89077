"""The trainer of both stages, exact resume, and `distill`."""

import itertools
import json
from collections import Counter
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModel, HfArgumentParser, Trainer, TrainerCallback, TrainerState, TrainingArguments

from dsla_hf import DSLAConfig, DSLALayer, set_level
from dsla_hf.models.adapter import dsla_layers
from dsla_hf.models.decoder import decoder_of
from dsla_hf.training.arguments import DSLATrainingArguments
from dsla_hf.training.ranking import LayerRanking, rank_layers
from dsla_hf.training.recipe import distill
from dsla_hf.training.trainer import DSLATrainer, draw_level

ORDER = [2, 0, 3, 1]  # the plan of the fixture `adapter_model`
STAGES = ("alignment", "logits")

# transformers 5.23 renamed it.
OLD, NEW = "gradient_checkpointing", "activation_checkpointing"
NAMES = {field.name for field in fields(TrainingArguments)}
CHECKPOINTING = NEW if NEW in NAMES else OLD


class Interrupted(Exception):
    """Stands for whatever ends a run from outside."""


class Gradients(TrainerCallback):
    """Gradients of the trained weights before each optimizer step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})


class At(TrainerCallback):
    """Stops (or interrupts) training after a step, or interrupts it once it is through."""

    def __init__(self, step=None, interrupt=False, stage=None):
        self.step, self.interrupt, self.stage = step, interrupt, stage

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step and self.stage in (None, args.stage):
            if self.interrupt:
                raise Interrupted
            control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        if self.step is None and self.stage == args.stage:
            raise Interrupted


def arguments(directory, **options):
    defaults = {
        "per_device_train_batch_size": 2,
        "max_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 5,
    }
    return DSLATrainingArguments(output_dir=str(directory), **{**defaults, **options})


def token_data(items=32, tokens=24):
    generator = torch.Generator().manual_seed(3)
    return [{"input_ids": ids} for ids in torch.randint(3, 97, (items, tokens), generator=generator)]


def together(data):
    return {name: torch.stack([item[name] for item in data]) for name in data[0]}


def train(model, directory, data=None, callbacks=(), **options):
    trainer = DSLATrainer(model, arguments(directory, **options), train_dataset=data or token_data(), callbacks=list(callbacks))
    trainer.train()
    return trainer


def logged(trainer, name):
    """Step -> the value of `name` in the training logs."""
    return {entry["step"]: entry[name] for entry in trainer.state.log_history if name in entry}


def first_gradients(model, directory, data, **options):
    """Gradients of one step over all of `data`, unclipped; the weights stay as they are."""
    recorder = Gradients()
    options = {"max_steps": 1, "learning_rate": 0.0, "max_grad_norm": 0.0, **options}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = train(model, directory, data, [recorder], **options)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    model.zero_grad()
    (gradients,) = recorder.steps
    return gradients, trainer


def assert_same_gradients(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def dsla_weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "dsla_" in name}


def base_weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "dsla_" not in name}


def layers_of(model):
    return {module.layer_idx: module for module in model.modules() if isinstance(module, DSLALayer)}


def layer_of(name):
    return int(name.split(".layers.")[1].split(".")[0])


def eval_loss(model, directory, data, stage):
    trainer = DSLATrainer(model, arguments(directory, stage=stage), eval_dataset=data)
    return trainer.evaluate()["eval_loss"]


@pytest.fixture
def base(tiny_model):
    """With norms of queries and keys; `llama` and `fresh` have none."""
    return tiny_model("qwen3")


@pytest.fixture
def model(base, adapter_model):
    return adapter_model(base)


@pytest.fixture
def llama(tiny_model, adapter_model):
    """An adapter on a small Llama."""
    return adapter_model(tiny_model("llama"))


@pytest.fixture
def fresh(tiny_model, adapter_model):
    """Factory: the same adapter on the same Llama, as a new process would make it."""

    def make(seed=0, **config):
        torch.manual_seed(seed)
        base = tiny_model("llama")
        torch.manual_seed(1)
        return adapter_model(base, **config)

    return make


# --- levels of steps --------------------------------------------------------------------------------------------


def test_drawn_levels_are_these_on_every_machine_and_in_every_release():
    """A run that is resumed must go on with the levels it would have had."""
    assert [draw_level(0, step, 4) for step in range(12)] == [3, 4, 3, 2, 4, 4, 3, 2, 2, 1, 4, 4]
    assert [draw_level(42, step, 28) for step in range(8)] == [9, 17, 20, 10, 2, 16, 28, 23]


def test_drawn_level_is_a_pure_function():
    levels = [draw_level(3, step, 6) for step in range(50)]
    torch.manual_seed(99)
    assert [draw_level(3, step, 6) for step in reversed(range(50))] == levels[::-1]


def test_drawn_levels_are_the_same_in_every_process_and_release():
    """They depend on no hash of the process: a run may go on elsewhere."""
    assert [draw_level(3, step, 6) for step in range(12)] == [5, 5, 6, 2, 5, 5, 5, 2, 4, 5, 3, 4]


@pytest.mark.parametrize("depth", [1, 2, 7])
def test_drawn_levels_are_uniform_from_1_to_the_depth(depth):
    counts = Counter(draw_level(0, step, depth) for step in range(1000 * depth))
    assert set(counts) == set(range(1, depth + 1))
    assert all(abs(count - 1000) < 150 for count in counts.values()), counts


def test_drawn_levels_differ_by_seed():
    first, second = ([draw_level(seed, step, 8) for step in range(100)] for seed in (0, 1))
    assert sum(a == b for a, b in zip(first, second, strict=True)) < 30


# --- arguments --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["both", "", None, "Logits"])
def test_unknown_stage_is_refused(stage, tmp_path):
    with pytest.raises(ValueError, match=r"stage must be one of \['alignment', 'logits'\]"):
        arguments(tmp_path, stage=stage)


def old_name_warns(name):
    return pytest.warns(FutureWarning, match=OLD) if name == OLD and CHECKPOINTING == NEW else nullcontext()


@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize("name", [OLD, NEW])
def test_reentrant_checkpointing_is_refused(name, as_text, tmp_path):
    if name not in NAMES:
        pytest.skip(f"this release of transformers has no {name}")
    options = {name: True, f"{name}_kwargs": '{"use_reentrant": true}' if as_text else {"use_reentrant": True}}
    with old_name_warns(name), pytest.raises(ValueError, match=r"use_reentrant.*loses the gradients.*\{'use_reentrant': False\}"):
        arguments(tmp_path, **options)


@pytest.mark.parametrize("options", [None, {}, {"use_reentrant": False}, {"preserve_rng_state": False}])
@pytest.mark.parametrize("name", [OLD, NEW])
def test_checkpointing_is_not_reentrant_unless_said(name, options, tmp_path):
    if name not in NAMES:
        pytest.skip(f"this release of transformers has no {name}")
    with old_name_warns(name):
        args = arguments(tmp_path, **{name: True, f"{name}_kwargs": options})
    expected = {**(options or {}), "use_reentrant": False}
    assert all(getattr(args, f"{n}_kwargs") == expected for n in {OLD, NEW} & NAMES)


def test_arguments_come_from_a_command_line_too(tmp_path):
    line = ["--output_dir", str(tmp_path), "--stage", "alignment", "--train_level", "3", "--use_cpu", "--report_to", "none"]
    (args,) = HfArgumentParser((DSLATrainingArguments,)).parse_args_into_dataclasses(line)
    assert (args.stage, args.train_level, args.learning_rate, args.lr_scheduler_type) == ("alignment", 3, 5e-4, "cosine")


# --- what is trained --------------------------------------------------------------------------------------------


def test_model_without_a_dsla_adapter_is_refused(tiny_model, tmp_path):
    with pytest.raises(ValueError, match=r"get_peft_model\(model, DSLAConfig"):
        DSLATrainer(tiny_model("llama"), arguments(tmp_path))
    lora = get_peft_model(tiny_model("llama"), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"get_peft_model\(model, DSLAConfig"):
        DSLATrainer(lora, arguments(tmp_path))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stage", STAGES)
def test_dsla_weights_are_trained_in_float32_and_the_base_is_not_touched(stage, dtype, base, adapter_model, tmp_path):
    model = adapter_model(base.to(dtype))
    before, frozen = dsla_weights(model), base_weights(model)
    assert {p.dtype for p in model.parameters()} == {dtype}
    trainer = train(model, tmp_path, stage=stage, max_steps=8, learning_rate=1e-3)
    assert {p.dtype for n, p in model.named_parameters() if "dsla_" in n} == {torch.float32}
    for name, weight in base_weights(model).items():
        assert weight.dtype == dtype and torch.equal(weight, frozen[name]), name
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("dsla_" in name)
        if "dsla_" in name:
            assert not torch.equal(parameter, before[name].float()), f"{name} was not trained"
            assert parameter.isfinite().all()
        else:
            assert parameter.grad is None, name
    assert all(loss > 0 for loss in logged(trainer, "loss").values())


def test_small_steps_are_not_lost_over_a_bfloat16_base(tiny_model, adapter_model, tmp_path):
    model = adapter_model(tiny_model("llama").bfloat16())
    train(model, tmp_path, max_steps=8, learning_rate=1e-5)
    weights = torch.cat([p.detach().flatten() for p in dsla_weights(model).values()])
    assert (weights != weights.bfloat16().float()).float().mean() > 0.9


@pytest.mark.parametrize("stage", STAGES)
def test_level_is_afterwards_what_it_was(stage, fresh, tmp_path):
    for level in (0, 3):
        model = fresh(level=level)
        train(model, tmp_path, stage=stage)
        assert model.get_level() == level and model.peft_config["default"].conversion_order == ORDER


@pytest.mark.parametrize("stage", STAGES)
def test_labels_in_the_data_are_ignored(stage, fresh, tmp_path):
    plain = token_data()
    labelled = [{**item, "labels": torch.full_like(item["input_ids"], -100)} for item in plain]
    results = []
    for data in (plain, labelled):
        model = fresh()
        trainer = train(model, tmp_path, data, stage=stage)
        results.append((logged(trainer, "loss"), dsla_weights(model), eval_loss(model, tmp_path, data[:3], stage)))
    assert results[0][0] == results[1][0] and results[0][2] == results[1][2]
    assert all(torch.equal(weight, results[1][1][name]) for name, weight in results[0][1].items())


@pytest.mark.parametrize("stage", STAGES)
def test_evaluate_gives_the_loss_and_changes_nothing(stage, model, tmp_path):
    data, before = token_data(5), dsla_weights(model)
    model.set_level(3)
    trainer = DSLATrainer(model, arguments(tmp_path, stage=stage, per_device_eval_batch_size=5), eval_dataset=data)
    metrics = trainer.evaluate()
    if stage == "logits":
        expected = plain_kl(model, together(data))
    else:
        expected = sum(plain_alignment(model, together(data)).values()) / 4
    assert metrics["eval_loss"] == pytest.approx(expected.item(), rel=1e-4)
    assert model.get_level() == 3 and all(torch.equal(w, before[n]) for n, w in dsla_weights(model).items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("stage, term", [("logits", "kl"), ("alignment", "alignment/layer_2")])
def test_evaluation_during_training_leaves_the_training_logs_as_they_are(stage, term, fresh, tmp_path):
    def run(**options):
        args = arguments(tmp_path, stage=stage, max_steps=4, logging_steps=4, **options)
        trainer = DSLATrainer(fresh(), args, train_dataset=token_data(), eval_dataset=token_data(4))
        trainer.train()
        return trainer

    plain, evaluated = run(), run(eval_strategy="steps", eval_steps=3)
    assert "eval_loss" in evaluated.state.log_history[0]
    assert logged(evaluated, "loss") == logged(plain, "loss")
    assert logged(evaluated, term) == logged(plain, term)


# --- stage alignment --------------------------------------------------------------------------------------------


def plain_alignment(model, batch):
    """Loss per layer: each layer's DSLA attention on what the base's attention got, against what that gave."""
    calls, hooks = {}, []
    for layer in layers_of(model).values():

        def keep(attention, args, kwargs, output):
            calls[attention.layer_idx] = (args, kwargs, output[0].detach())

        hooks.append(layer.base_layer.register_forward_hook(keep, with_kwargs=True))
    with torch.no_grad(), model.disable_adapter():
        model(**batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    losses = {}
    for index, (args, kwargs, target) in calls.items():
        prediction = layers_of(model)[index].dsla_attention()(*args, **kwargs)[0]
        losses[index] = (prediction - target).square().sum() / target.square().sum()
    return losses


def test_alignment_loss_decreases(model, tmp_path):
    trainer = train(model, tmp_path, stage="alignment", max_steps=30, learning_rate=1e-2, lr_scheduler_type="constant")
    for index in range(4):
        losses = list(logged(trainer, f"alignment/layer_{index}").values())
        assert len(losses) == 30
        first, last = sum(losses[:5]) / 5, sum(losses[-5:]) / 5
        assert last < 0.8 * first, f"layer {index}: {first:.3f} -> {last:.3f}"


def test_alignment_logs_every_layer_and_its_half_lives(llama, tmp_path):
    llama.set_level(1)
    trainer = train(llama, tmp_path, stage="alignment", max_steps=3)
    names = {f"alignment/layer_{i}" for i in range(4)} | {f"half_life/{s}/layer_{i}" for s in ("history", "recency") for i in range(4)}
    for entry in trainer.state.log_history[:3]:
        assert {name for name in entry if "/" in name} == names and "kl" not in entry
        mean = sum(entry[f"alignment/layer_{i}"] for i in range(4)) / 4
        assert entry["loss"] == pytest.approx(mean, rel=1e-3)


def test_only_layers_of_the_plan_are_aligned(tiny_model, adapter_model, tmp_path):
    trainer = train(adapter_model(tiny_model("llama"), conversion_order=[3, 1]), tmp_path, stage="alignment", max_steps=1)
    assert {name for name in trainer.state.log_history[0] if name.startswith("alignment/")} == {"alignment/layer_1", "alignment/layer_3"}


@pytest.mark.parametrize("level", [0, 2, 4])
@pytest.mark.parametrize("window_size", [0, 8])
def test_alignment_losses_and_gradients_by_hand_at_every_level(base, level, window_size, adapter_model, tmp_path):
    model, data = adapter_model(base, level=level, window_size=window_size), token_data(2)
    gradients, trainer = first_gradients(model, tmp_path, data, stage="alignment")
    model.train()
    losses = plain_alignment(model, together(data))
    for index, loss in losses.items():
        assert logged(trainer, f"alignment/layer_{index}")[1] == pytest.approx(loss.item(), rel=1e-4)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    expected = torch.autograd.grad(sum(losses.values()) / 4, list(parameters.values()))
    assert_same_gradients(gradients, dict(zip(parameters, expected, strict=True)), rtol=1e-4, atol=1e-6)
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())


def test_layers_are_aligned_independently(model, tmp_path):
    data = token_data(2)
    gradients, trainer = first_gradients(model, tmp_path, data, stage="alignment")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "dsla_" in name and layer_of(name) == 1:
                parameter.add_(torch.randn_like(parameter))
    changed_gradients, changed = first_gradients(model, tmp_path, data, stage="alignment")
    for index in range(4):
        name = f"alignment/layer_{index}"
        assert (logged(trainer, name) == logged(changed, name)) == (index != 1)
    for name, gradient in gradients.items():
        assert torch.equal(changed_gradients[name], gradient) == (layer_of(name) != 1), name


# --- stage logits -----------------------------------------------------------------------------------------------


def plain_kl(model, batch):
    """KL(base || model at its level) per token."""
    with torch.no_grad(), model.disable_adapter():
        teacher = model(**batch, use_cache=False).logits.log_softmax(-1)
    student = model(**batch, use_cache=False).logits.log_softmax(-1)
    return (teacher.exp() * (teacher - student)).sum(-1).mean()


def test_kl_decreases(model, tmp_path):
    args = {"stage": "logits", "max_steps": 30, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "train_level": 4}
    trainer = train(model, tmp_path, **args)
    losses = list(logged(trainer, "kl").values())
    assert len(losses) == 30 and sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_logits_stage_logs_kl_and_half_lives(llama, tmp_path):
    trainer = train(llama, tmp_path, stage="logits", max_steps=3)
    names = {"kl"} | {f"half_life/{state}/layer_{index}" for state in ("history", "recency") for index in range(4)}
    for entry in trainer.state.log_history[:3]:
        assert {name for name in entry if "/" in name or name == "kl"} == names
        assert entry["loss"] == pytest.approx(entry["kl"], rel=1e-3)


def test_logged_half_lives_are_those_of_the_gates(tiny_model, tmp_path):
    model = get_peft_model(tiny_model("llama"), DSLAConfig(task_type="CAUSAL_LM", window_size=8, half_lives=(100.0, 5.0)))
    with torch.no_grad():  # one channel of one head of layer 2: a geometric mean over 2 heads of 4 channels
        model.get_submodule("base_model.model.model.layers.2.self_attn").dsla_core["default"].gate_bias[0, 1, 3] = 30.0
    trainer = train(model, tmp_path, max_steps=1, learning_rate=0.0)
    for index in range(4):
        assert logged(trainer, f"half_life/history/layer_{index}")[1] == pytest.approx(100, rel=1e-3)
        if index != 2:
            assert logged(trainer, f"half_life/recency/layer_{index}")[1] == pytest.approx(5, rel=1e-3)
    lives = layers_of(model)[2].dsla_core["default"].bias_half_lives()[:, 1]
    assert logged(trainer, "half_life/recency/layer_2")[1] == pytest.approx(lives.log().mean().exp().item(), rel=1e-3)
    assert logged(trainer, "half_life/recency/layer_2")[1] > 20


@pytest.mark.parametrize("level", [1, 3, 4])
def test_kl_and_its_gradients_by_hand(model, level, tmp_path):
    data = token_data(2)
    gradients, trainer = first_gradients(model, tmp_path, data, stage="logits", train_level=level)
    model.train().set_level(level)
    loss = plain_kl(model, together(data))
    assert logged(trainer, "kl")[1] == pytest.approx(loss.item(), rel=1e-4)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    expected = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
    assert_same_gradients(gradients, dict(zip(parameters, expected, strict=True)), rtol=1e-4, atol=1e-6)


def test_gradients_of_idle_layers_are_zero_not_missing(model, tmp_path):
    gradients, _ = first_gradients(model, tmp_path, token_data(2), stage="logits", train_level=1)
    assert {layer_of(name) for name in gradients} == {0, 1, 2, 3}
    for name, gradient in gradients.items():
        assert gradient is not None, name
        assert bool(gradient.any()) == (layer_of(name) == ORDER[0]), name


def levels_of_steps(model, directory, **options):
    """The layers that were DSLA in the student's pass of each step."""
    seen = []

    def record(decoder, args, output):
        if torch.is_grad_enabled():
            seen.append(sorted(index for index, layer in layers_of(decoder).items() if layer.converted))

    hook = decoder_of(model.get_base_model()).register_forward_hook(record)
    train(model, directory, stage="logits", **options)
    hook.remove()
    return seen


@pytest.mark.parametrize("seed", [0, 4])
def test_every_step_runs_at_its_drawn_level(llama, seed, tmp_path):
    expected = [draw_level(seed, step, 4) for step in range(8)]
    assert len(set(expected)) > 2
    llama.set_level(1)
    assert levels_of_steps(llama, tmp_path, seed=seed, max_steps=8) == [sorted(ORDER[:level]) for level in expected]


def test_all_batches_of_an_accumulated_step_run_at_one_level(llama, tmp_path):
    levels = levels_of_steps(llama, tmp_path, seed=0, max_steps=4, gradient_accumulation_steps=2)
    assert levels == [sorted(ORDER[: draw_level(0, step, 4)]) for step in range(4) for _ in range(2)]


def test_levels_are_drawn_from_the_plan(fresh, tmp_path):
    levels = levels_of_steps(fresh(conversion_order=[3, 1]), tmp_path, seed=0, max_steps=6)
    assert levels == [sorted([3, 1][: draw_level(0, step, 2, 2)]) for step in range(6)]


def test_level_of_the_arguments_holds_for_all_steps(llama, tmp_path):
    assert levels_of_steps(llama, tmp_path, train_level=3, max_steps=4) == [sorted(ORDER[:3])] * 4
    assert llama.get_level() == 4


def test_level_0_of_the_arguments_would_train_nothing(llama, tmp_path):
    with pytest.raises(ValueError, match="train_level 0 is level 0, the original model, where nothing is trained"):
        train(llama, tmp_path, stage="logits", train_level=0)
    assert llama.get_level() == 4


@pytest.mark.parametrize("level", [0, 2])
def test_a_distilled_adapter_is_at_the_highest_level_that_was_trained(tiny_model, level, tmp_path):
    config = DSLAConfig(task_type="CAUSAL_LM", window_size=8, **({"level": level} if level else {}))
    model = get_peft_model(tiny_model("llama"), config)
    distill(model, token_data(), arguments(tmp_path), alignment_steps=0, logits_steps=0)
    assert model.get_level() == level, "nothing was trained"
    distill(model, token_data(), arguments(tmp_path), alignment_steps=1, logits_steps=1)
    trained = model.get_level()
    saved = PeftModel.from_pretrained(model.unload(), tmp_path)
    assert trained == saved.get_level() == 4


@pytest.mark.parametrize("level", [5, -1])
def test_level_of_the_arguments_that_the_plan_does_not_have_is_refused(llama, level, tmp_path):
    before = dsla_weights(llama)
    with pytest.raises(ValueError, match=f"level.*{level}"):
        train(llama, tmp_path, train_level=level)
    assert llama.get_level() == 4 and all(torch.equal(w, before[n]) for n, w in dsla_weights(llama).items())


def test_level_changed_between_forward_and_backward_is_an_error(llama, tmp_path):
    trainer = DSLATrainer(llama, arguments(tmp_path, stage="logits", train_level=2), train_dataset=token_data())
    llama.set_level(1)
    backward = trainer.accelerator.backward

    def change_level_first(loss, **kwargs):
        llama.set_level(3)
        backward(loss, **kwargs)

    trainer.accelerator.backward = change_level_first
    with pytest.raises(RuntimeError, match="level changed between forward and backward"):
        trainer.train()
    assert llama.get_level() == 1, "the level is put back after an error too"


# --- checkpointing, accumulation, padding -----------------------------------------------------------------------


@pytest.mark.parametrize("level", [1, 3, 4])
@pytest.mark.parametrize("stage", STAGES)
def test_checkpointing_does_not_change_losses_or_gradients(stage, level, model, tmp_path):
    data, options = token_data(2), {"stage": stage, "train_level": level}
    expected, plain = first_gradients(model, tmp_path, data, **options)
    found, checkpointed = first_gradients(model, tmp_path, data, **options, **{CHECKPOINTING: True})
    assert decoder_of(model.get_base_model()).layers[0].gradient_checkpointing
    assert_same_gradients(found, expected, rtol=1e-5, atol=1e-5)
    assert all(found[name].any() == gradient.any() for name, gradient in expected.items())
    assert logged(checkpointed, "loss")[1] == pytest.approx(logged(plain, "loss")[1], rel=1e-5)


def test_accumulated_kl_equals_that_of_a_larger_batch(model, tmp_path):
    data, options = token_data(4), {"stage": "logits", "train_level": 3}
    expected, whole = first_gradients(model, tmp_path, data, per_device_train_batch_size=4, **options)
    found, accumulated = first_gradients(model, tmp_path, data, gradient_accumulation_steps=2, **options)
    assert_same_gradients(found, expected, rtol=1e-4, atol=1e-6)
    for name in ("loss", "kl"):
        assert logged(accumulated, name)[1] == pytest.approx(logged(whole, name)[1], rel=1e-5)


def test_accumulated_alignment_is_the_mean_over_its_batches(model, tmp_path):
    data = token_data(4)
    halves = [first_gradients(model, tmp_path, data[i : i + 1], stage="alignment", per_device_train_batch_size=1) for i in range(4)]
    found, accumulated = first_gradients(
        model, tmp_path, data, stage="alignment", per_device_train_batch_size=1, gradient_accumulation_steps=4
    )
    expected = {name: sum(gradients[name] for gradients, _ in halves) / 4 for name in found}
    assert_same_gradients(found, expected, rtol=1e-4, atol=1e-6)
    for name in ("loss", *(f"alignment/layer_{index}" for index in range(4))):
        assert logged(accumulated, name)[1] == pytest.approx(sum(logged(trainer, name)[1] for _, trainer in halves) / 4, rel=1e-4)


def padded(item, real, side, filler):
    """The first `real` tokens of an item, brought to its full length by `filler` on a side."""
    ids = item["input_ids"]
    padding = torch.full((len(ids) - real,), filler)
    mask = [torch.ones(real, dtype=torch.long), torch.zeros(len(ids) - real, dtype=torch.long)]
    parts = [ids[:real], padding]
    order = 1 if side == "right" else -1
    return {"input_ids": torch.cat(parts[::order]), "attention_mask": torch.cat(mask[::order])}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("stage", STAGES)
def test_padding_has_no_influence(stage, side, model, tmp_path):
    (item,) = token_data(1)
    model.set_level(3)
    expected = eval_loss(model, tmp_path, [{"input_ids": item["input_ids"][:15]}], stage)
    assert expected > 0.01
    losses = [eval_loss(model, tmp_path, [padded(item, 15, side, filler)], stage) for filler in (0, 50)]
    assert losses[0] == pytest.approx(expected, rel=1e-4) and losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_rows_of_a_batch_count_by_their_real_tokens(model, tmp_path):
    first, second = token_data(2)
    model.set_level(3)
    rows = [eval_loss(model, tmp_path, [{"input_ids": item["input_ids"][:real]}], "logits") for item, real in ((first, 24), (second, 9))]
    batch = [{**first, "attention_mask": torch.ones(24, dtype=torch.long)}, padded(second, 9, "right", 50)]
    assert eval_loss(model, tmp_path, batch, "logits") == pytest.approx((24 * rows[0] + 9 * rows[1]) / 33, rel=1e-4)


@pytest.mark.parametrize("stage", STAGES)
def test_padding_has_no_influence_on_gradients(stage, llama, tmp_path):
    (item,) = token_data(1)
    options = {"stage": stage, "train_level": 3}
    expected, _ = first_gradients(llama, tmp_path, [{"input_ids": item["input_ids"][:15]}], **options)
    found, _ = first_gradients(llama, tmp_path, [padded(item, 15, "left", 50)], **options)
    assert_same_gradients(found, expected, rtol=1e-3, atol=1e-5)


# --- exact resume -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_resume_is_exact(stage, fresh, tmp_path):
    options = {"stage": stage, "max_steps": 8, "save_strategy": "steps", "save_steps": 4, "learning_rate": 1e-2}
    whole = fresh()
    whole_trainer = train(whole, tmp_path / "whole", **options)
    train(fresh(), tmp_path / "parts", callbacks=[At(4)], **options)
    assert [path.name for path in (tmp_path / "parts").glob("checkpoint-*")] == ["checkpoint-4"]

    resumed = fresh()
    trainer = DSLATrainer(resumed, arguments(tmp_path / "parts", **options), train_dataset=token_data())
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 8
    for name, weight in dsla_weights(whole).items():
        assert torch.equal(weight, dsla_weights(resumed)[name]), name
    names = {"loss", "learning_rate", "grad_norm"} | ({"kl"} if stage == "logits" else {f"alignment/layer_{i}" for i in range(4)})
    names |= {f"half_life/{state}/layer_{i}" for state in ("history", "recency") for i in range(4)}
    for name in names:
        assert logged(trainer, name) == logged(whole_trainer, name) and len(logged(trainer, name)) == 8, name


# --- distill ----------------------------------------------------------------------------------------------------


def ranking_batches():
    return [torch.stack([item["input_ids"] for item in token_data(4)])]


def run_distill(model, directory, *, callbacks=(), ranking=True, steps=(4, 4), method="random", metric="kl", **options):
    options = {"save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2, "lr_scheduler_type": "constant", **options}
    return distill(
        model,
        token_data(),
        arguments(directory, **options),
        alignment_steps=steps[0],
        logits_steps=steps[1],
        method=method,
        ranking_data=ranking_batches() if ranking else None,
        ranking_metric=metric,
        callbacks=list(callbacks),
    )


def assert_same_adapter(found, expected):
    assert found.peft_config["default"].conversion_order == expected.peft_config["default"].conversion_order
    for name, weight in dsla_weights(expected).items():
        assert torch.equal(dsla_weights(found)[name], weight), name


def no_training(*args, **kwargs):
    raise AssertionError("trained again")


def steps_of(directory):
    return json.loads((directory / "trainer_state.json").read_text())["global_step"]


def test_distill_trains_both_stages_and_saves_adapter_and_ranking(fresh, tmp_path):
    model = fresh()
    start, frozen = dsla_weights(model), base_weights(model)
    ranking = run_distill(model, tmp_path)
    assert (steps_of(tmp_path / "alignment"), steps_of(tmp_path / "logits")) == (4, 4)
    assert all(torch.equal(weight, frozen[name]) for name, weight in base_weights(model).items())
    assert not any(torch.equal(weight, start[name]) for name, weight in dsla_weights(model).items())
    stored = json.loads((tmp_path / "ranking.json").read_text())
    assert LayerRanking.from_dict(stored) == ranking and ranking.tokens == 4 * 24
    config = DSLAConfig.from_pretrained(tmp_path)
    assert config.conversion_order == ranking.order == model.peft_config["default"].conversion_order
    assert config.order_scores == {str(layer): ranking.scores[layer] for layer in ranking.order}
    loaded = PeftModel.from_pretrained(fresh().unload(), tmp_path)
    assert_same_adapter(loaded, model)


def test_layers_are_ranked_after_the_alignment(fresh, tmp_path):
    ranking, aligned = run_distill(fresh(), tmp_path), fresh()
    train(aligned, tmp_path / "by hand", stage="alignment", max_steps=4, learning_rate=1e-2, lr_scheduler_type="constant")
    expected, unaligned = (rank_layers(model, ranking_batches(), progress=False) for model in (aligned, fresh()))
    assert (ranking.order, ranking.scores) == (expected.order, pytest.approx(expected.scores))
    assert ranking.scores != pytest.approx(unaligned.scores, rel=0.01)


def test_logits_stage_uses_the_ranked_order(fresh, tmp_path):
    orders = []

    class Order(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            orders.append((args.stage, model.peft_config["default"].conversion_order))

    ranking = run_distill(fresh(conversion_order=[0, 1, 2, 3]), tmp_path, callbacks=[Order()])
    assert ranking.order != [0, 1, 2, 3]
    assert orders == [("alignment", [0, 1, 2, 3])] * 4 + [("logits", ranking.order)] * 4


def test_without_ranking_data_the_order_stays(fresh, tmp_path):
    model = fresh()
    assert run_distill(model, tmp_path, ranking=False, steps=(2, 2)) is None
    assert model.peft_config["default"].conversion_order == ORDER and DSLAConfig.from_pretrained(tmp_path).conversion_order == ORDER
    assert not (tmp_path / "ranking.json").exists()


def test_finished_distillation_is_read_back(fresh, tmp_path, monkeypatch):
    model = fresh()
    ranking = run_distill(model, tmp_path)
    monkeypatch.setattr(Trainer, "train", no_training)
    monkeypatch.setattr("dsla_hf.training.recipe.rank_layers", no_training)
    again = fresh()
    assert run_distill(again, tmp_path) == ranking
    assert_same_adapter(again, model)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {n for n, p in model.named_parameters() if p.requires_grad}


def test_finished_distillation_over_a_bfloat16_base_is_read_back(tiny_model, adapter_model, tmp_path, monkeypatch):
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        model = adapter_model(tiny_model("llama").bfloat16())
        run_distill(model, tmp_path)
        models.append(model)
        monkeypatch.setattr(Trainer, "train", no_training)
    assert {p.dtype for p in dsla_weights(models[1]).values()} == {torch.float32}
    assert_same_adapter(models[1], models[0])


# What interrupts the run, and from which step on the stages go on when it is started again (4: nothing is left to do).
INTERRUPTIONS = {
    "in stage 1": (At(3, interrupt=True, stage="alignment"), 2, 0),
    "in stage 2": (At(3, interrupt=True, stage="logits"), 4, 2),
    "before the first checkpoint of stage 2": (At(1, interrupt=True, stage="logits"), 4, 0),
    "after the last step of stage 1": (At(stage="alignment"), 4, 0),
    "after the last step of stage 2": (At(stage="logits"), 4, 4),
}


class Steps(TrainerCallback):
    """Stage and number of every step that is trained."""

    def __init__(self):
        self.steps = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.steps.append((args.stage, state.global_step))


@pytest.fixture
def whole_run(fresh, tmp_path):
    """`whole_run(steps=...)`: model and ranking after a distillation that nothing interrupts, which is trained once for all tests."""

    def run(**options):
        key = str(options)
        if key not in WHOLE:
            model = fresh()
            WHOLE[key] = model, run_distill(model, tmp_path / "whole", **options)
        return WHOLE[key]

    return run


WHOLE = {}


@pytest.mark.parametrize("when", INTERRUPTIONS)
def test_interrupted_distillation_goes_on_exactly(when, fresh, whole_run, tmp_path):
    interruption, alignment_from, logits_from = INTERRUPTIONS[when]
    whole, ranking = whole_run()
    with pytest.raises(Interrupted):
        run_distill(fresh(), tmp_path / "parts", callbacks=[interruption])
    model, trained = fresh(), Steps()
    assert run_distill(model, tmp_path / "parts", callbacks=[trained]) == ranking
    assert trained.steps == [("alignment", step) for step in range(alignment_from, 4)] + [
        ("logits", step) for step in range(logits_from, 4)
    ]
    assert_same_adapter(model, whole)


def test_interrupted_between_the_stages(fresh, whole_run, tmp_path, monkeypatch):
    whole, ranking = whole_run()

    def interrupt(*args, **kwargs):
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr("dsla_hf.training.recipe.rank_layers", interrupt)
        with pytest.raises(Interrupted):
            run_distill(fresh(), tmp_path / "parts")
    assert not (tmp_path / "parts" / "ranking.json").exists()
    model = fresh()
    assert run_distill(model, tmp_path / "parts") == ranking
    assert_same_adapter(model, whole)


def test_adapter_with_a_name_of_its_own_is_read_back(tiny_model, tmp_path, monkeypatch):
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        model = get_peft_model(tiny_model("llama"), DSLAConfig(task_type="CAUSAL_LM", window_size=8), adapter_name="mine")
        distill(model, token_data(), arguments(tmp_path, save_strategy="steps", save_steps=2), alignment_steps=2, logits_steps=2)
        models.append(dsla_weights(model))
        monkeypatch.setattr(Trainer, "train", no_training)
    assert all(torch.equal(weight, models[1][name]) for name, weight in models[0].items())


@pytest.mark.parametrize(
    "finished, other", [("alignment", {"seed": 7}), ("alignment", {"window_size": 12}), ("both", {"seed": 7})], ids=lambda value: str(value)
)
def test_stages_finished_for_another_model_are_refused_before_anything_is_done(finished, other, fresh, tmp_path, monkeypatch):
    """Same shapes do not mean that these weights belong to this model."""
    if finished == "both":
        run_distill(fresh(), tmp_path, ranking=False, steps=(2, 2))
    else:
        with pytest.raises(Interrupted):
            run_distill(fresh(), tmp_path, callbacks=[At(1, interrupt=True, stage="logits")], ranking=False, steps=(2, 2))
    model = fresh(**other)
    before = dsla_weights(model)
    monkeypatch.setattr(Trainer, "train", no_training)
    with pytest.raises(ValueError, match="other"):
        run_distill(model, tmp_path, ranking=False, steps=(2, 2))
    assert all(torch.equal(weight, before[name]) for name, weight in dsla_weights(model).items()), "weights of another model were loaded"


@pytest.mark.parametrize("steps", [(0, 2), (2, 0)])
def test_stage_of_no_steps_trains_nothing(steps, fresh, tmp_path):
    trained = Steps()
    run_distill(fresh(), tmp_path, steps=steps, callbacks=[trained])
    assert trained.steps == [("logits" if steps[1] else "alignment", step) for step in range(2)]


def test_training_leaves_the_config_of_the_base_as_it_was(tiny_model, adapter_model, tmp_path):
    model = adapter_model(tiny_model("llama"))
    before = model.config.to_dict()
    DSLATrainer(model, arguments(tmp_path, max_steps=1), train_dataset=token_data()).train()
    assert model.config.to_dict() == before


# --- the chain --------------------------------------------------------------------------------------------------


class Weights(TrainerCallback):
    """The DSLA weights of each layer at the end of every training run."""

    def __init__(self):
        self.after = []

    def on_train_end(self, args, state, control, model=None, **kwargs):
        weights = {
            i: {n: p.detach().clone() for n, p in layer.named_parameters() if "dsla_" in n} for i, layer in dsla_layers(model).items()
        }
        self.after.append((args.stage, args.train_level, state.global_step, weights))


def same(a, b):
    return all(torch.equal(a[name], weight) for name, weight in b.items())


def test_chain_trains_each_layer_at_its_own_level_and_never_again(fresh, tmp_path):
    model, recorder = fresh(), Weights()
    ranking = run_distill(model, tmp_path, method="chain", steps=(2, 10), callbacks=[recorder])
    stages = [(stage, level, steps) for stage, level, steps, _ in recorder.after]
    assert stages == [("alignment", None, 2), ("logits", 1, 2), ("logits", 2, 3), ("logits", 3, 2), ("logits", 4, 3)]
    weights = [after for *_, after in recorder.after]
    for turn, layer in enumerate(ranking.order, 1):
        changed = [not same(before[layer], after[layer]) for before, after in itertools.pairwise(weights)]
        assert changed == [link == turn for link in range(1, 5)], layer
    # Level k is part of level k + 1, bit for bit: what link k saved is what the adapter runs at level k.
    for level in range(1, 5):
        link = PeftModel.from_pretrained(fresh().unload(), tmp_path / "logits" / f"level_{level:02d}")
        for found in (link, model):
            found.eval()
            set_level(found, level)
        with torch.no_grad():
            assert torch.equal(link(**together(token_data(2))).logits, model(**together(token_data(2))).logits)


def test_chain_sees_other_text_first_in_each_link(fresh, tmp_path):
    firsts = []

    class First(TrainerCallback):
        def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
            firsts.append(next(iter(train_dataloader))["input_ids"].tolist())

    run_distill(fresh(), tmp_path, method="chain", steps=(0, 4), callbacks=[First()])
    assert len(firsts) == 4 and len({str(first) for first in firsts}) == 4


@pytest.mark.parametrize("link, step", [(1, 1), (3, 3)])
def test_interrupted_chain_goes_on_exactly(link, step, fresh, whole_run, tmp_path):
    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if args.train_level == link and state.global_step == step:
                raise Interrupted

    options = {"method": "chain", "steps": (2, 16)}
    whole, _ = whole_run(**options)
    with pytest.raises(Interrupted):
        run_distill(fresh(), tmp_path / "parts", callbacks=[Interrupt()], **options)
    model, trained = fresh(), Steps()
    run_distill(model, tmp_path / "parts", callbacks=[trained], **options)
    assert len(trained.steps) == (4 - link) * 4 + 4 - (step - 1) // 2 * 2  # checkpoints are written every two steps
    assert_same_adapter(model, whole)


def test_after_an_interrupted_chain_all_layers_can_be_trained(fresh, tmp_path):
    model = fresh()
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    with pytest.raises(Interrupted):
        run_distill(model, tmp_path, method="chain", callbacks=[At(1, interrupt=True, stage="logits")])
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable


@pytest.mark.parametrize("first, second", [("random", "chain"), ("chain", "random")])
def test_going_on_with_another_method_is_refused(first, second, fresh, tmp_path):
    run_distill(fresh(), tmp_path, method=first)
    with pytest.raises(ValueError, match="same settings"):
        run_distill(fresh(), tmp_path, method=second)


def test_chain_of_fewer_steps_than_layers_is_refused(fresh, tmp_path):
    with pytest.raises(ValueError, match="a chain over 4 layers needs 4 steps or more, got logits_steps 3"):
        run_distill(fresh(), tmp_path, method="chain", steps=(2, 3))
    assert not list(tmp_path.iterdir())


def test_unknown_method_is_refused(fresh, tmp_path):
    with pytest.raises(ValueError, match=r"method must be one of \['random', 'chain'\], got 'all'"):
        run_distill(fresh(), tmp_path, method="all")


def test_distill_ranks_by_the_metric_asked_for(fresh, tmp_path):
    ranking = run_distill(fresh(), tmp_path, metric="entropy", steps=(2, 2))
    assert ranking.metric == "entropy" and ranking == LayerRanking.from_dict(json.loads((tmp_path / "ranking.json").read_text()))


# --- learning rates and further terms ---------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_gates_and_mix_have_a_learning_rate_of_their_own(stage, llama, tmp_path):
    trainer = train(llama, tmp_path, stage=stage, max_steps=1, learning_rate=1e-3, gate_learning_rate_factor=7.0, weight_decay=0.1)
    rates = {id(p): group["initial_lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    trained = {name: p for name, p in llama.named_parameters() if p.requires_grad}
    assert len(rates) == len(trained) == sum(len(group["params"]) for group in trainer.optimizer.param_groups)
    for name, p in trained.items():
        own = "dsla_core" in name and "norm_weight" not in name
        assert rates[id(p)] == pytest.approx(7e-3 if own else 1e-3), name
    assert {p for name, p in trained.items() if "dsla_core" in name} and {p for name, p in trained.items() if "proj" in name}


def test_factor_of_one_leaves_the_optimizer_of_transformers(llama, tmp_path):
    trainer = train(llama, tmp_path, max_steps=1, learning_rate=1e-3, gate_learning_rate_factor=1.0)
    assert {group["initial_lr"] for group in trainer.optimizer.param_groups} == {1e-3}


def test_hidden_term_is_the_mean_alignment_after_each_block(llama, tmp_path):
    data = token_data(2)
    trainer = train(llama, tmp_path, data, max_steps=1, learning_rate=0.0, train_level=3, hidden_weight=0.5)
    with torch.no_grad():
        hidden = []
        for level in (0, 3):
            set_level(llama, level)
            hidden.append(llama.train()(**together(data), output_hidden_states=True).hidden_states[1:])
        terms = [((s - t).square().sum() / t.square().sum()).item() for t, s in zip(*hidden, strict=True)]
    found = logged(trainer, "hidden")[1]
    assert found == pytest.approx(sum(terms) / len(terms), rel=1e-4) and found > 0
    assert logged(trainer, "loss")[1] == pytest.approx(logged(trainer, "kl")[1] + 0.5 * found, rel=1e-4)


def test_bare_decoders_are_aligned_but_have_no_logits(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 97}
    model = get_peft_model(AutoModel.from_config(AutoConfig.for_model("llama", **sizes)), DSLAConfig(task_type="FEATURE_EXTRACTION"))
    with pytest.raises(ValueError, match="stage 'logits' needs a causal LM, and LlamaModel is none: distil over AutoModelForCausalLM"):
        train(model, tmp_path, max_steps=1)
    with pytest.raises(ValueError, match="needs a causal LM"):
        distill(model, None, arguments(tmp_path), alignment_steps=1, logits_steps=1)


def test_terms_without_weight_are_not_computed(llama, tmp_path):
    trainer = train(llama, tmp_path, max_steps=1)
    assert not logged(trainer, "hidden")


@pytest.mark.parametrize("name, value", [("hidden_weight", -1.0), ("gate_learning_rate_factor", float("nan"))])
def test_weights_that_are_none_are_refused(name, value, tmp_path):
    with pytest.raises(ValueError, match=f"{name} must be"):
        arguments(tmp_path, **{name: value})


# --- tokens that count ------------------------------------------------------------------------------------------


def marked_data(items=4, tokens=24, padded=False):
    data = token_data(items, tokens)
    generator = torch.Generator().manual_seed(4)
    for i, item in enumerate(data):
        item["loss_mask"] = (torch.rand(tokens, generator=generator) < 0.4).long()
        if padded:
            item["attention_mask"] = (torch.arange(tokens) >= i).long()
    return data


@pytest.mark.parametrize("padded", [False, True])
def test_kl_counts_marked_tokens_alone(model, padded, tmp_path):
    data = marked_data(padded=padded)
    inputs = together(data)
    mask = inputs["loss_mask"] * inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    given = {name: inputs[name] for name in ("input_ids", "attention_mask") if name in inputs}
    with torch.no_grad():
        logits = []
        for level in (0, 3):
            set_level(model, level)
            logits.append(model.train()(**given).logits.double().log_softmax(-1))
        kl = (logits[0].exp() * (logits[0] - logits[1])).sum(-1)
    trainer = train(model, tmp_path, data, max_steps=1, learning_rate=0.0, train_level=3, per_device_train_batch_size=4)
    assert logged(trainer, "kl")[1] == pytest.approx(((kl * mask).sum() / mask.sum()).item(), rel=1e-4)


def test_alignment_counts_marked_tokens_alone(llama, tmp_path):
    data = marked_data()
    everything = [{"input_ids": item["input_ids"]} for item in data]
    options = {"stage": "alignment", "max_steps": 1, "learning_rate": 0.0, "per_device_train_batch_size": 4}
    marked, plain = (
        logged(train(llama, tmp_path / name, rows, **options), "alignment/layer_2")[1] for name, rows in (("a", data), ("b", everything))
    )
    ones = [{**item, "loss_mask": torch.ones(24, dtype=torch.long)} for item in everything]
    assert logged(train(llama, tmp_path / "c", ones, **options), "alignment/layer_2")[1] == pytest.approx(plain)
    assert marked != pytest.approx(plain, rel=1e-3)


# --- when it goes wrong -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_loss_that_is_not_finite_stops_names_the_layer_and_keeps_the_checkpoint(stage, llama, tmp_path):
    class Break(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 3:
                layer = dsla_layers(model)[3]
                layer.dsla_q_proj["default"].weight.data[0, 0] = float("nan")

    before = None

    class Remember(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            nonlocal before
            before = {name: p.detach().clone() for name, p in model.named_parameters()}

    options = {"stage": stage, "max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    options |= {"train_level": 4} if stage == "logits" else {}
    with pytest.raises(FloatingPointError, match=r"step 4 is not finite.*the weights of layer 3.*last whole checkpoint is .*checkpoint-2"):
        train(llama, tmp_path, callbacks=[Break(), Remember()], **options)
    others = {name: p for name, p in llama.named_parameters() if p.isfinite().all()}
    assert len(others) > 10 and all(torch.equal(p, before[name]) for name, p in others.items())
    assert (tmp_path / "checkpoint-2" / "trainer_state.json").exists() and not (tmp_path / "checkpoint-4").exists()


def test_overflow_inside_a_layer_is_named_too(llama, tmp_path):
    with torch.no_grad():
        dsla_layers(llama)[0].dsla_o_proj["default"].weight.fill_(3e38)
    with pytest.raises(FloatingPointError, match="step 1 is not finite at level 4; not finite is the output in layer 0"):
        train(llama, tmp_path, train_level=4)


def test_broken_base_is_not_blamed_on_a_layer_of_ours(llama, tmp_path):
    with torch.no_grad():
        llama.get_base_model().model.layers[1].self_attn.base_layer.v_proj.weight[0] = float("inf")
    with pytest.raises(FloatingPointError, match="original model's attention in layer 1"):
        train(llama, tmp_path, train_level=4)


def test_checkpoint_cut_off_by_a_full_disk_is_passed_over(fresh, tmp_path, monkeypatch):
    whole = fresh()
    run_distill(whole, tmp_path / "whole")
    state_of_trainer = TrainerState.save_to_json

    def full(self, path):
        if "checkpoint-4" in path and "logits" in path:
            Path(path).write_text('{"epoch": ')
            raise OSError(28, "No space left on device")
        state_of_trainer(self, path)

    monkeypatch.setattr(TrainerState, "save_to_json", full)
    with pytest.raises(
        OSError, match=r"No space left on device while writing to .*logits. The last whole checkpoint is .*checkpoint-2; make room"
    ):
        run_distill(fresh(), tmp_path / "parts")
    monkeypatch.undo()
    model, trained = fresh(), Steps()
    run_distill(model, tmp_path / "parts", callbacks=[trained])
    assert trained.steps == [("logits", 2), ("logits", 3)]
    assert_same_adapter(model, whole)
