"""Autocast over fp32 weights: the layer computes outside it, and a model is no further from fp32 than its base is."""

import copy

import pytest
import torch
from torch.nn.functional import linear
from transformers import DynamicCache, StaticCache, Trainer, TrainingArguments

from dsla_hf import DualStateAttention
from dsla_hf.models.adapter_layer import AdapterLinear
from dsla_hf.training.arguments import DSLATrainingArguments
from dsla_hf.training.text import PackedTokens
from dsla_hf.training.trainer import DSLATrainer

IDS = torch.randint(3, 97, (2, 30), generator=torch.Generator().manual_seed(3))
LOW = (torch.bfloat16, torch.float16)
low_dtypes = pytest.mark.parametrize("dtype", LOW, ids=["bf16", "fp16"])
forms = pytest.mark.parametrize("form", ["adapter", "hybrid"])
windows = pytest.mark.parametrize("window_size", [0, 8])
FP32 = torch.float32  # of `autocast`: off


def autocast(dtype):
    return torch.autocast("cpu", torch.bfloat16 if dtype == FP32 else dtype, enabled=dtype != FP32)


def distance(found, expected):
    found, expected = found.detach().float(), expected.detach().float()
    return float((found - expected).norm() / expected.norm())


@pytest.fixture
def dsla_model(tiny_model, adapter_model):
    def make(form="adapter", kind="llama", **config):
        model = adapter_model(tiny_model(kind), **{"level": 3, **config})
        return model if form == "adapter" else model.merge_and_unload().eval()

    return make


@pytest.fixture
def allowed(tiny_model):
    """Twice the error of the base's logits and of its gradients: `allowed(dtype, kind)`."""
    return lambda dtype, kind="llama": [2 * error for error in errors(tiny_model(kind), dtype)]


def logits_and_gradients(model, dtype):
    model.requires_grad_(True).zero_grad()
    with autocast(dtype):
        output = model(IDS, labels=IDS, use_cache=False)
    output.loss.backward()
    return output.logits.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def errors(model, dtype):
    pairs = zip(logits_and_gradients(model, dtype), logits_and_gradients(model, FP32), strict=True)
    return [distance(found, expected) for found, expected in pairs]


# --- the layer ----------------------------------------------------------------------------------------------------


def make_attention(window_size, heads=(4, 2)):
    attention = DualStateAttention(*heads, 8, window_size=window_size, gate_rank=3, sink_tokens=2)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))
    return attention


@windows
@low_dtypes
def test_the_layer_computes_in_the_widest_dtype_with_autocast_off(window_size, dtype):
    """Keys rotated in fp32, values as autocast rounds them; a prompt, several tokens more, one token, a fold."""
    attention = make_attention(window_size)
    q, k, v = (torch.randn(2, 30, heads, 8) for heads in (4, 2, 2))
    low = v.to(dtype)

    def run(v):
        o, state = attention(q[:, :20], k[:, :20], v[:, :20], output_state=True)
        outputs = [o, *attention.fold(k, v)]
        for piece in (slice(20, 29), slice(29, 30)):
            o, state = attention(q[:, piece], k[:, piece], v[:, piece], state=state, output_state=True)
            outputs += [o, *state]
        return outputs

    expected = run(low.float())
    with autocast(dtype):
        found = run(low)
    assert all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(found, expected, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(run(low), expected, strict=True)), "without autocast, too"


@windows
def test_fp16_autocast_keeps_to_the_range_of_fp32(window_size):
    """Where nothing is rotated queries, keys and values all come in fp16: products of the layer pass its range."""
    attention = make_attention(window_size)
    qkv = [(200 * torch.randn(2, 30, heads, 8)).half() for heads in (4, 2, 2)]
    with autocast(torch.float16):
        o, state = attention(*qkv, output_state=True)
    expected, expected_state = attention(*(x.float() for x in qkv), output_state=True)
    assert o.dtype == torch.float16 and torch.equal(o, expected.half()) and o.isfinite().all()
    assert torch.equal(state.recurrent, expected_state.recurrent) and state.window_k.dtype == torch.float32


@low_dtypes
def test_a_state_of_another_dtype_goes_on(dtype):
    attention = make_attention(8)
    q, k, v = (torch.randn(2, 30, heads, 8) for heads in (4, 2, 2))
    expected, _ = attention(q, k, v)
    _, state = attention(*(x[:, :20].to(dtype) for x in (q, k, v)), output_state=True)
    wide, new = attention(q[:, 20:], k[:, 20:], v[:, 20:], state=state, output_state=True)
    assert wide.dtype == new.window_k.dtype == torch.float32 and distance(wide, expected[:, 20:]) < 0.02
    _, state = attention(q[:, :20], k[:, :20], v[:, :20], output_state=True)
    low, _ = attention(*(x[:, 20:].to(dtype) for x in (q, k, v)), state=state)
    assert low.dtype == dtype and distance(low, expected[:, 20:]) < 0.02


@pytest.mark.parametrize("window_size", [0, 4])
def test_kernels_are_given_one_dtype(window_size, interpreted_kernels, monkeypatch):
    attention = make_attention(window_size, heads=(2, 1)).requires_grad_(False)
    q, k, v = (torch.randn(1, 7, heads, 8) for heads in (2, 1, 1))

    def run():
        with autocast(torch.float16):
            o, state = attention(q[:, :6], k[:, :6], v[:, :6].half(), output_state=True)
            return [o, attention(q[:, 6:], k[:, 6:], v[:, 6:].half(), state=state, output_state=True)[0]]

    found = run()
    monkeypatch.undo()
    for x, y in zip(found, run(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="bf16 is chosen where kernels run on a GPU")
@windows
def test_on_a_gpu_bf16_autocast_computes_in_bf16(window_size):
    attention = make_attention(window_size).cuda()
    q, k, v = (torch.randn(2, 30, heads, 8, device="cuda") for heads in (4, 2, 2))
    with torch.autocast("cuda", torch.bfloat16):
        o, state = attention(q, k, v.bfloat16(), output_state=True)
    expected, _ = attention(*(x.bfloat16() for x in (q, k, v)), output_state=True)
    assert o.dtype == torch.float32 and torch.equal(o, expected.float()) and state.window_k.dtype == torch.bfloat16


def test_compiled_with_autocast_inside():
    attention, qkv = make_attention(8), [torch.randn(2, 20, heads, 8) for heads in (4, 2, 2)]

    def run(q, k, v):
        with autocast(torch.bfloat16):
            return attention(q, k, v.bfloat16())[0]

    assert torch.equal(torch.compile(run, backend="eager", fullgraph=True)(*qkv), run(*qkv))


@low_dtypes
def test_projections_of_the_adapter_round_as_those_of_the_base(dtype):
    own = AdapterLinear(8, 6)
    x = torch.randn(3, 8)
    with autocast(dtype):
        assert torch.equal(own(x), linear(x, own.weight, own.bias)) and own(x).dtype == dtype


# --- whole models -------------------------------------------------------------------------------------------------


@forms
@low_dtypes
@pytest.mark.parametrize("kind", ["llama", "phi3"])  # phi3: fused projections
def test_logits_and_gradients_are_as_close_to_fp32_as_those_of_the_base(dsla_model, allowed, form, dtype, kind):
    found = errors(dsla_model(form, kind, trained_projections=["q_proj", "v_proj", "o_proj"]), dtype)
    bounds = allowed(dtype, kind)
    assert all(0 < error < bound for error, bound in zip(found, bounds, strict=True)), (found, bounds)


@pytest.mark.parametrize(
    "form, dtype, level, static",
    [
        ("adapter", torch.bfloat16, 2, False),
        ("hybrid", torch.float16, 2, False),
        ("adapter", torch.float16, 4, True),
        ("hybrid", torch.bfloat16, 4, True),
    ],
)
def test_steps_give_what_the_whole_text_gives(dsla_model, allowed, form, dtype, level, static):
    """All of it under autocast, or only the beginning, or only the rest."""
    model, bound = dsla_model(form, level=level), allowed(dtype)[0]
    with torch.no_grad():
        with autocast(dtype):
            whole = model(IDS, use_cache=False).logits
        for first, then in ((dtype, dtype), (dtype, FP32), (FP32, dtype)):
            cache = StaticCache(config=model.config, max_cache_len=50) if static else DynamicCache(config=model.config)
            with autocast(first):
                outputs = [model(IDS[:, :22], past_key_values=cache).logits]
            with autocast(then):
                outputs += [model(IDS[:, t : t + 1], past_key_values=cache).logits for t in range(22, 30)]
            assert distance(torch.cat(outputs, 1), whole) < bound


@low_dtypes
def test_a_level_is_raised_in_mid_text(dsla_model, allowed, dtype):
    model, bound = dsla_model(), allowed(dtype)[0]

    def run(first, then):
        model.set_level(1)
        with autocast(first):
            cache = model(IDS[:, :20]).past_key_values
        model.set_level(4)
        with autocast(then):
            return model(IDS[:, 20:], past_key_values=cache).logits

    with torch.no_grad():
        expected = run(FP32, FP32)
        for first, then in ((dtype, dtype), (dtype, FP32), (FP32, dtype)):
            assert 0 < distance(run(first, then), expected) < bound


@pytest.mark.parametrize("form, dtype", [("adapter", torch.bfloat16), ("hybrid", torch.float16)])
def test_texts_are_generated(dsla_model, form, dtype):
    model, options = dsla_model(form, level=4), {"max_new_tokens": 6, "do_sample": False}
    with autocast(dtype):
        text = model.generate(IDS[:1], **options)
        for others in ({"cache_implementation": "static"}, {"use_cache": False}, {"prompt_lookup_num_tokens": 2}):
            assert torch.equal(model.generate(IDS[:1], **options, **others), text), others


@pytest.mark.parametrize("form, use_reentrant", [("adapter", False), ("hybrid", True)])
def test_what_is_computed_again_is_what_was(dsla_model, form, use_reentrant):
    model = dsla_model(form).train()
    expected = logits_and_gradients(model, torch.bfloat16)
    # transformers 5.23 renamed it.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})
    assert all(torch.equal(x, y) for x, y in zip(logits_and_gradients(model, torch.bfloat16), expected, strict=True))


# --- trainers -----------------------------------------------------------------------------------------------------


def losses(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


OPTIONS = {"max_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "logging_steps": 1, "save_strategy": "no"}
OPTIONS |= {"report_to": [], "disable_tqdm": True, "use_cpu": True}


@forms
def test_the_trainer_of_transformers(dsla_model, form, tmp_path):
    data = [{"input_ids": row, "labels": row} for row in IDS]
    model = dsla_model(form)
    runs = [
        losses(Trainer(copy.deepcopy(model), TrainingArguments(output_dir=str(tmp_path), bf16=bf16, **OPTIONS), train_dataset=data))
        for bf16 in (True, False)
    ]
    assert runs[0] == pytest.approx(runs[1], rel=0.01) and runs[0] != runs[1]


@pytest.mark.parametrize("options", [{"stage": "alignment"}, {"stage": "logits"}], ids=str)
def test_distillation(dsla_model, options, tmp_path):
    model = dsla_model()
    runs = []
    for bf16 in (True, False):
        args = DSLATrainingArguments(output_dir=str(tmp_path), bf16=bf16, **options, **OPTIONS)
        runs.append(losses(DSLATrainer(copy.deepcopy(model), args, train_dataset=PackedTokens(IDS))))
    assert runs[0] == pytest.approx(runs[1], rel=0.02) and runs[0] != runs[1]
