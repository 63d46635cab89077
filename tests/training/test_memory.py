"""What training holds in memory: logits once, no activations of the teacher, no layer above the last one that is aligned."""

from contextlib import nullcontext
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
from peak_bytes import PeakBytes
from transformers import TrainingArguments

from dsla_hf.models.decoder import decoder_layers, first_layers
from dsla_hf.training import arguments, sharding
from dsla_hf.training.arguments import DSLATrainingArguments
from dsla_hf.training.losses import kl_sums
from dsla_hf.training.trainer import DSLATrainer

STAGES = ("alignment", "logits")
NAMES = {field.name for field in fields(TrainingArguments)}
CHECKPOINTING = "activation_checkpointing" if "activation_checkpointing" in NAMES else "gradient_checkpointing"


class Saved(torch.autograd.graph.saved_tensors_hooks):
    """Bytes that autograd keeps for backward passes, weights left out."""

    def __init__(self, model):
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.storages = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                self.storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        super().__init__(pack, lambda tensor: tensor)

    @property
    def bytes(self):
        return sum(self.storages.values())


@pytest.fixture
def make(tiny_model, adapter_model):
    """Factory: an adapter on a small Llama, always the same."""

    def make(dtype=torch.float32, **config):
        torch.manual_seed(0)
        base = tiny_model("llama").to(dtype)
        torch.manual_seed(1)
        return adapter_model(base, **config)

    return make


@pytest.fixture
def trainer(make, tmp_path):
    """Factory of trainers over 2 texts of 64 tokens each step; keyword arguments are training arguments."""

    def build(model=None, steps=2, **options):
        generator = torch.Generator().manual_seed(3)
        data = [{"input_ids": ids} for ids in torch.randint(3, 97, (2, 64), generator=generator)]
        defaults = {"max_steps": steps, "logging_steps": 1, "save_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": True}
        args = DSLATrainingArguments(output_dir=str(tmp_path / "run"), per_device_train_batch_size=2, **{**defaults, **options})
        return DSLATrainer(make() if model is None else model, args, train_dataset=data)

    return build


def losses(trainer):
    trainer.train()
    return [{name: x for name, x in entry.items() if "alignment" in name or name == "loss"} for entry in trainer.state.log_history[:-1]]


# --- logits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reuse, gradients", [(False, 1), (True, 0)])
def test_kl_holds_a_gradient_and_one_chunk_beside_the_logits(reuse, gradients, monkeypatch):
    monkeypatch.setattr("dsla_hf.training.losses.TOKENS_PER_CHUNK", 64)
    student, teacher = (torch.randn(4, 1024, 50, requires_grad=name == 0) for name in range(2))
    with PeakBytes(student, teacher) as peak:
        total, count = kl_sums(student, teacher, reuse_teacher=reuse)
        (gradient,) = torch.autograd.grad(total / count, student)
    logits = student.numel() * 4
    assert peak.peak < (gradients + 0.25) * logits
    assert (gradient.data_ptr() == teacher.data_ptr()) == reuse


def test_kl_over_the_teacher_gives_the_same_and_refuses_a_second_backward_pass():
    student, teacher = (torch.randn(2, 1500, 7, requires_grad=name == 0) for name in range(2))
    expected, _ = kl_sums(student, teacher)
    (gradient,) = torch.autograd.grad(expected, student)
    found, _ = kl_sums(student, teacher, reuse_teacher=True)
    assert torch.equal(found, expected) and torch.equal(*torch.autograd.grad(found, student, retain_graph=True), gradient)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(found, student)


# --- alignment --------------------------------------------------------------------------------------------------


def test_alignment_runs_no_layer_above_the_last_one(make, trainer, monkeypatch):
    def run():
        model = make(conversion_order=[1, 0])
        ran = []
        for index, block in enumerate(decoder_layers(model.get_base_model())):
            block.register_forward_hook(lambda *_, index=index: ran.append(index))
        return losses(trainer(model, stage="alignment")), ran

    found, ran = run()
    assert ran == [0, 1] * 2
    monkeypatch.setattr("dsla_hf.training.trainer.first_layers", lambda *_: nullcontext())
    expected, all_ran = run()
    assert all_ran == [0, 1, 2, 3] * 2 and found == expected


def test_alignment_of_trained_layers_only(make, trainer):
    model, whole = make(), make()
    model.base_model.set_trainable_layers([1])
    blocks = decoder_layers(model.get_base_model())
    found, expected = losses(trainer(model, stage="alignment")), losses(trainer(whole, stage="alignment"))
    assert len(blocks) == 4 and decoder_layers(model.get_base_model()) is blocks
    assert [sorted(entry) for entry in found] == [["alignment/layer_1", "loss"]] * 2
    assert found[0]["alignment/layer_1"] == expected[0]["alignment/layer_1"]


def test_decoder_is_whole_again_after_an_error(make):
    model = make()
    base = model.get_base_model()
    with first_layers(base, 2):
        with pytest.raises(IndexError):
            model(input_ids=torch.tensor([[1000]]))
        assert len(decoder_layers(base)) == 4
        assert model(input_ids=torch.tensor([[1]])).logits.shape == (1, 1, 97)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_nothing_of_the_teacher_is_kept_in_alignment(checkpointing, make, trainer):
    model = make()
    kept = []
    for block in decoder_layers(model.get_base_model()):
        block.register_forward_hook(lambda module, args, output: kept.append((args[0].requires_grad, output.requires_grad)))
    trainer(model, stage="alignment", **{CHECKPOINTING: checkpointing}).train()
    assert kept == [(False, False)] * 8


def test_alignment_keeps_inputs_and_targets_alone_with_checkpointing(make, trainer):
    def kept(**options):
        model = make()
        run = trainer(model, steps=1, stage="alignment", **options)
        saved = Saved(model)
        with saved:
            run.train()
        return saved.bytes

    plain, checkpointed = kept(), kept(**{CHECKPOINTING: True})
    assert checkpointed < plain / 4


# --- both stages ------------------------------------------------------------------------------------------------


def test_backward_pass_ends_at_the_lowest_dsla_layer(make, trainer):
    model = make()  # order 2, 0, 3, 1
    inputs = {}
    for index, block in enumerate(decoder_layers(model.get_base_model())):
        block.register_forward_hook(lambda m, args, out, index=index: inputs.__setitem__(index, args[0].requires_grad))
    trainer(model, steps=1, train_level=1, **{CHECKPOINTING: True}).train()
    assert inputs == {0: False, 1: False, 2: False, 3: True}


def test_hidden_states_of_the_teacher_are_kept_from_the_lowest_dsla_layer_on(make, trainer, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "dsla_hf.training.trainer.alignment_sums", lambda s, t, mask: seen.append(s) or (s.sum() * 0 + 1, s.new_tensor(2.0))
    )
    run = trainer(make(), steps=1, train_level=1, hidden_weight=1.0)
    run.train()
    assert len(seen) == 2, "blocks 0 and 1 give student and teacher the same"
    assert run.state.log_history[0]["hidden"] == pytest.approx(2 * 0.5 / 4)


@pytest.mark.parametrize("stage", STAGES)
def test_trained_weights_alone_are_float32(stage, make, trainer):
    model = make(torch.bfloat16)
    run = trainer(model, stage=stage)
    run.train()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all("dsla_" in name for name in trained)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if name in trained else torch.bfloat16), name
    states = run.optimizer.state
    assert len(states) == len(trained) and all(state["exp_avg"].dtype == torch.float32 for state in states.values())


# --- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["argument", "launcher"])
def test_deepspeed_is_refused_before_anything_is_set_up(way, tmp_path, monkeypatch):
    if way == "launcher":
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    options = {"deepspeed": {"zero_optimization": {"stage": 3}}} if way == "argument" else {}
    with pytest.raises(ValueError, match=r"DeepSpeed is not supported.*examples/configs/fsdp2\.yaml"):
        DSLATrainingArguments(output_dir=str(tmp_path), use_cpu=True, **options)


@pytest.mark.parametrize(
    "plugin, mixed_precision, fix",
    [
        ({"fsdp_version": 1}, "no", "fsdp_version: 2"),
        ({"activation_checkpointing": True}, "no", "--gradient_checkpointing true"),
        ({}, "bf16", "--dtype bfloat16"),
    ],
)
def test_other_ways_of_fsdp_are_refused(plugin, mixed_precision, fix):
    state = SimpleNamespace(fsdp_plugin=SimpleNamespace(**{"fsdp_version": 2, "activation_checkpointing": False, **plugin}))
    with pytest.raises(ValueError, match=fix):
        sharding.check_fsdp(SimpleNamespace(state=state, mixed_precision=mixed_precision))


def test_fsdp_that_accelerate_leaves_out_is_said(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    said = []
    monkeypatch.setattr(sharding.logger, "warning_once", said.append)
    sharding.check_fsdp(SimpleNamespace(state=SimpleNamespace()))
    assert len(said) == 1 and "every process holds the whole model" in said[0]


def test_one_process_uses_one_gpu_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 4))
    said = []
    monkeypatch.setattr(arguments.logger, "warning", said.append)
    args = DSLATrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    assert args._n_gpu == 1 and len(said) == 1 and "one of 4 GPUs" in said[0] and "accelerate launch" in said[0]
