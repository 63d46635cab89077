"""Norms, MLPs, rotations and linear layers by other kernels while a step is captured: the same results, and nothing left behind."""

import copy
import threading
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_model
from tiny import ARCHITECTURE_OPTIONS
from torch import nn
from transformers import DynamicCache
from transformers.models.llama import modeling_llama

from dsla_hf.inference import fusion as fused_steps
from dsla_hf.inference import joined
from dsla_hf.inference.fusion import can_compile, fused
from dsla_hf.inference.joined import join_weights
from dsla_hf.inference.recorder import Recorder
from dsla_hf.models.adapter import dsla_layers
from dsla_hf.models.decoder import decoder_layers

IDS = torch.tensor([[5, 17, 31, 44, 9, 60]])


@pytest.fixture
def counted():
    """Stands for torch.compile: counts what is compiled, and how often it runs."""

    class Counted:
        def __init__(self):
            self.functions, self.calls = [], 0

        def __call__(self, function):
            self.functions.append(function.__qualname__)

            def run(*args, **kwargs):
                self.calls += 1
                return function(*args, **kwargs)

            return run

    return Counted()


@pytest.mark.parametrize("level", [0, 2, 4])
def test_every_layer_runs_them_and_gives_the_same(tiny_model, adapter_model, base_kind, counted, level):
    model = adapter_model(tiny_model(base_kind), level=level)
    expected = model(IDS).logits
    with fused(model, counted):
        found = model(IDS).logits
    assert torch.equal(found, expected)
    # Two norms (one with the sum before it) and an MLP a layer and the last norm, a rotation a layer; Qwen 3 has norms of queries and keys.
    layers = model.config.num_hidden_layers
    assert counted.calls == layers * (6 if base_kind == "qwen3" else 4) + 1
    # Norms of heads are compiled apart from those of hidden states.
    assert len(counted.functions) == (5 if base_kind == "qwen3" else 4), counted.functions


def test_nothing_is_left_behind(tiny_model, counted):
    model, rotation = tiny_model("llama"), modeling_llama.apply_rotary_pos_emb

    def fail():
        with fused(model, counted):
            assert modeling_llama.apply_rotary_pos_emb is not rotation
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert modeling_llama.apply_rotary_pos_emb is rotation
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_forwards_of_others_stay(tiny_model, counted):
    """accelerate puts hooked forwards into modules."""
    model = tiny_model("llama")
    norm = model.model.norm
    hooked = norm.forward
    norm.forward = lambda x: hooked(x)
    mine = norm.forward
    with fused(model, counted):
        assert norm.forward is mine
    assert norm.forward is mine


def test_a_second_model_of_a_kind_compiles_nothing(tiny_model, counted):
    for model in (tiny_model("llama"), tiny_model("llama")):
        with fused(model, counted):
            model(IDS)
    assert len(counted.functions) == 4


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_no_batch_or_length_is_one_too_many_for_the_compiler(tiny_model, kind):
    """torch.compile gives a function up that it has compiled for eight kinds of inputs, and runs it as it is."""
    model = tiny_model(kind, num_hidden_layers=1)
    with torch.no_grad(), torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for rows in (1, 2, 3, 4, 8, 17):
            for tokens in (30, 40, 50):
                with fused(model, eagerly, prompt=True):
                    model(IDS.new_ones(rows, tokens))
            with fused(model, eagerly):
                model(IDS.new_ones(rows, 1))


def eagerly(function):
    """What `torch.compile` guards and counts, without the time that a backend takes."""
    return torch.compile(function, backend="eager")


def test_where_compilation_fails(monkeypatch):
    def broken(function, **options):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", broken)
    can_compile.cache_clear()
    assert not can_compile(torch.device("cpu"))
    can_compile.cache_clear()


# --- linear layers ------------------------------------------------------------------------------------------------------


@pytest.fixture
def launches(monkeypatch):
    """Stands for the choice of kernels on a GPU, and for the kernels: the number of weights of each launch, 0 for a gate and what it
    gates. Their own tests are in tests/kernels/test_few_rows.py."""
    launched = []

    def takes(x, *weights):
        few = x.numel() <= 4 * x.shape[-1]  # fewer than a prompt has here
        return few and not torch.is_grad_enabled() and all(weight.dtype == x.dtype for weight in weights)

    def linears(x, weights, biases=None, overlap=False):
        launched.append(len(weights))
        return [F.linear(x, weight, bias) for weight, bias in zip(weights, biases or [None] * len(weights), strict=True)]

    def gated_linear(x, gate, up, activation, overlap=False):
        launched.append(0)
        activate = F.silu if activation == "silu" else lambda y: F.gelu(y, approximate="tanh")
        return activate(F.linear(x, gate)) * F.linear(x, up)

    monkeypatch.setattr(fused_steps, "takes_few_rows", takes)
    monkeypatch.setattr(fused_steps, "linears", linears)
    monkeypatch.setattr(fused_steps, "gated_linear", gated_linear)
    return launched


@torch.no_grad()
def decode(model, steps=3, rows=2, behind_prompt=lambda: None):
    """Logits of tokens read one by one behind a prompt; `behind_prompt()` is called before the first of them."""
    cache = DynamicCache(config=model.config)
    ids = IDS.expand(rows, -1)
    model(ids, past_key_values=cache)
    behind_prompt()
    return torch.cat([model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(steps)], 1)


LAYER = [3, 1, 0, 1]  # queries, keys and values; the output; gate and up; down
# Experts in place of MLPs; one matrix of queries, keys and values, and queries of their own in the two layers that are converted.
LAYERS = {kind: [3, 1] * 4 for kind in ("gpt_oss", "qwen3_moe", "mixtral")} | {"phi3": [1, 1, 1, 0, 1, 1, 1, 0, 1] * 2}


@pytest.mark.parametrize("level", [None, 0, 2, 4])
def test_every_linear_layer_of_a_token_is_in_a_launch(tiny_model, adapter_model, base_kind, counted, launches, level):
    """Converted layers have queries and outputs of their own."""
    model = tiny_model(base_kind) if level is None else adapter_model(tiny_model(base_kind), level=level)
    expected = decode(model)
    with fused(model, counted):
        found = decode(model)
    assert torch.equal(found, expected)
    # The prompt has more than one token.
    assert launches == (LAYER * 4 + [1]) * 3


@pytest.mark.parametrize("kind", ARCHITECTURE_OPTIONS)
def test_other_architectures(tiny_model, adapter_model, counted, launches, kind):
    """Biases, other activations, projections in one matrix, experts, norms elsewhere."""
    model = adapter_model(tiny_model(kind), level=2)
    expected = decode(model)
    with fused(model, counted):
        found = decode(model)
    if kind == "phi3":  # gate and up are two products
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(found, expected)
    assert any(name.endswith((".join", "_add")) for name in counted.functions)  # between attention and MLP
    assert launches == (LAYERS.get(kind, LAYER * 4) + [1]) * 3


def test_the_kernels_themselves(tiny_model, adapter_model, counted, interpreted_kernels, monkeypatch):
    for kind, layers, level, rows in (("llama", 2, 1, 3), ("qwen2", 1, 0, 1), ("gemma2", 1, 1, 2)):  # the interpreter takes seconds a layer
        base = tiny_model(kind, num_hidden_layers=layers, layer_types=["full_attention"] * layers)
        model = adapter_model(base, conversion_order=[1, 0][-layers:], level=level)
        monkeypatch.setattr("dsla_kernels.dispatch.choice", "pytorch")
        expected = decode(model, 1, rows)
        with fused(model, counted):
            found = decode(model, 1, rows, lambda: monkeypatch.setattr("dsla_kernels.dispatch.choice", "triton"))
        torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4)


def test_a_step_as_it_is_with_gradients_and_many_rows(tiny_model, counted, launches, monkeypatch):
    model = tiny_model("llama")
    with fused(model, counted):
        model(IDS[:, :1]).logits.sum().backward()
    assert launches == []
    monkeypatch.undo()  # with the choice as it is: PyTorch on a CPU
    expected = decode(model)
    with fused(model, counted):
        assert torch.equal(decode(model), expected)


def test_what_is_not_plain_stays(tiny_model, counted, launches):
    """Weights of another kind, forwards of others, hooks that see what goes in and out."""
    model = tiny_model("llama", tie_word_embeddings=False)
    first, second, third, fourth = decoder_layers(model)

    class Scaled(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    first.self_attn.k_proj.__class__ = Scaled
    first.mlp.down_proj.__class__ = Scaled
    own = second.self_attn.q_proj.forward
    second.self_attn.q_proj.forward = lambda x: 3 * own(x)
    second.mlp.act_fn = nn.ReLU()
    seen = []
    third.self_attn.v_proj.register_forward_hook(lambda module, inputs, output: seen.append(output) or 2 * output)
    third.mlp.up_proj.register_forward_hook(lambda module, inputs, output: 2 * output)
    fourth.self_attn.k_proj.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))
    fourth.mlp.gate_proj.bias = nn.Parameter(torch.randn(48))
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.to(torch.float64).float())
    expected = decode(model, 1)
    seen.clear()
    with fused(model, counted):
        found = decode(model, 1)
    assert torch.equal(found, expected)
    assert launches == [1, 1, 1] + [1, 1, 1] + [3, 1] + [1, 1, 1, 1] + [1]
    assert len(seen) == 2


def test_a_hidden_state_that_is_replaced(tiny_model, launches, counted):
    """Keys of another x are computed, and what was kept for them is not used again."""
    attention = tiny_model("llama").model.layers[0].self_attn
    x, other = torch.randn(2, 1, 1, 32)
    with torch.no_grad(), fused(attention, counted):
        attention.q_proj(x)
        assert torch.equal(attention.k_proj(other), F.linear(other, attention.k_proj.weight))
        assert torch.equal(attention.k_proj(x), F.linear(x, attention.k_proj.weight))
        assert torch.equal(attention.v_proj(x), F.linear(x, attention.v_proj.weight))
        assert launches == [3, 1, 2]  # keys that are asked for anew bring values along
        attention.v_proj(x)
        assert launches == [3, 1, 2, 1]


def test_threads_that_run_the_model_meanwhile(tiny_model, launches, counted):
    model = tiny_model("llama")
    expected = {rows: decode(model, rows=rows) for rows in (1, 2, 3)}
    wrong = []

    def run(rows):
        for _ in range(5):
            if not torch.equal(decode(model, rows=rows), expected[rows]):
                wrong.append(rows)

    with fused(model, counted):
        threads = [threading.Thread(target=run, args=(rows,)) for rows in expected]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_linear_forwards_are_put_back(tiny_model, adapter_model, counted, launches):
    model = adapter_model(tiny_model("llama"), level=2)
    with fused(model, counted):
        assert "forward" in model.lm_head.__dict__
        assert all("forward" in layer.q_proj.__dict__ for layer in dsla_layers(model).values())
        decode(model, 1)
    launches.clear()
    assert not any("forward" in module.__dict__ for module in model.modules())
    decode(model, 1)
    assert launches == []


# --- weights that lie beside each other -----------------------------------------------------------------------------------


@pytest.fixture
def products(monkeypatch):
    """Shapes of the weights that are multiplied here, not by a layer: of products that are made of several, and of `down_proj`."""
    made, real = [], F.linear

    def linear(x, weight, bias=None):
        made.append(tuple(weight.shape))
        return real(x, weight, bias)

    monkeypatch.setattr(fused_steps, "F", SimpleNamespace(linear=linear))
    return made


def projections(attention):
    return [len(getattr(attention, name).weight) for name in ("q_proj", "k_proj", "v_proj")]


@pytest.mark.parametrize("kind, level", [("llama", None), ("llama", 2), ("qwen2", 0), ("gemma3_text", None), ("phi3", None)])
@pytest.mark.parametrize("prompt", [False, True])
def test_products_of_one_x_are_one_where_their_weights_are_beside_each_other(
    tiny_model, adapter_model, counted, products, kind, level, prompt
):
    """Steps of more rows than there are kernels for; biases; queries of their own; what is one matrix already."""
    base = tiny_model(kind)
    model = base if level is None else adapter_model(base, level=level)
    expected, layers = decode(model), base.config.num_hidden_layers
    count = join_weights(model)
    assert torch.equal(decode(model), expected)  # the model alone runs as before
    with fused(model, counted, prompt=prompt):
        found = decode(model)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    if kind == "phi3":
        assert count == 0 and not products
        return
    assert count == 2 * layers
    sizes, inner = projections(base.model.layers[-1].self_attn), 2 * base.config.intermediate_size
    whole, values, inner = ((size, base.config.hidden_size) for size in (sum(sizes), sum(sizes[1:]), inner))
    calls = 4  # the prompt, and three tokens
    assert products.count(inner) == calls * layers
    assert products.count(whole) == calls * (layers - (level or 0)) and products.count(values) == calls * (level or 0)


def test_kernels_for_few_rows_come_first(tiny_model, counted, launches, products):
    model = tiny_model("llama")
    join_weights(model)
    with fused(model, counted):
        decode(model, behind_prompt=products.clear)
    assert launches[-3 * (len(LAYER) * 4 + 1) :] == (LAYER * 4 + [1]) * 3 and not products


def test_gradients_and_autocast_go_through_each_layer(tiny_model, counted, products):
    model = tiny_model("llama")
    join_weights(model)
    with fused(model, counted):
        model(IDS).logits.sum().backward()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            model(IDS)
    assert not products and model.model.layers[0].self_attn.v_proj.weight.grad.abs().sum() > 0


def test_joined_weights_can_be_changed_moved_and_saved(tiny_model, counted, products, tmp_path):
    model = tiny_model("llama")
    before = decode(model)
    parameters = list(model.parameters())
    assert join_weights(model) == 8 and join_weights(model) == 0  # once is enough
    assert all(x is y for x, y in zip(model.parameters(), parameters, strict=True))
    model.save_pretrained(tmp_path)
    assert torch.equal(decode(type(model).from_pretrained(tmp_path).eval()), before)
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        attention.k_proj.weight.mul_(2)
    changed = decode(model)
    assert not torch.equal(changed, before)
    with fused(model, counted):
        torch.testing.assert_close(decode(model), changed, atol=1e-5, rtol=1e-5)
        assert products
        attention.k_proj.weight.data = attention.k_proj.weight.data.clone()
        products.clear()
        torch.testing.assert_close(decode(model), changed, atol=1e-5, rtol=1e-5)
        assert products.count((sum(projections(attention)), 32)) == 4 * 3  # not in the first layer


def test_joined_weights_are_whole_whoever_saves_them(tiny_model, tmp_path):
    """Also by those who take tensors of one storage for the same; none is copied for it."""
    model = tiny_model("qwen2", tie_word_embeddings=False)
    expected = {name: x.clone() for name, x in model.state_dict().items()}
    assert join_weights(model) == 8
    found = model.state_dict()
    for name, parameter in model.named_parameters():
        x = found[name]
        assert x.data_ptr() == parameter.data_ptr() and x.untyped_storage().nbytes() == x.nbytes and torch.equal(x, expected[name])
    Accelerator(cpu=True).save_model(model, tmp_path)
    save_model(model, tmp_path / "again.safetensors")
    torch.save(copy.deepcopy(model).state_dict(), tmp_path / "copy.pt")
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj", "up_proj"]))
    torch.save(wrapped.merge_and_unload().state_dict(), tmp_path / "merged.pt")
    for file in ("model.safetensors", "again.safetensors", "copy.pt", "merged.pt"):
        saved = load_file(tmp_path / file) if file.endswith("s") else torch.load(tmp_path / file)
        assert saved.keys() == expected.keys() and all(torch.equal(saved[name], x) for name, x in expected.items()), file
    other = tiny_model("qwen2", tie_word_embeddings=False)
    model.load_state_dict(other.state_dict())
    assert torch.equal(decode(model), decode(other))


def test_what_shares_its_memory_is_not_joined(tiny_model):
    model = tiny_model("llama")
    first, second = (layer.self_attn for layer in model.model.layers[:2])
    second.k_proj.weight = first.k_proj.weight  # one parameter, two layers
    held = torch.zeros(2, *first.q_proj.weight.shape)
    model.model.layers[2].self_attn.q_proj.weight.data = held[1]
    assert join_weights(model) == 8 - 2


def test_without_memory_weights_stay_where_they_are(tiny_model, monkeypatch, caplog):
    model, left = tiny_model("llama"), [3]
    before, real = decode(model), torch.cat

    def cat(tensors, *args):
        if left[0] == 0:
            raise torch.OutOfMemoryError("CUDA out of memory")
        left[0] -= 1
        return real(tensors, *args)

    with monkeypatch.context() as patch:
        patch.setattr(joined.torch, "cat", cat)
        assert join_weights(model) == 3
    assert "memory does not suffice" in caplog.text and torch.equal(decode(model), before)


def test_recorders_join_weights_before_they_record(monkeypatch):
    """On a GPU, where layers are fused."""
    seen = []
    monkeypatch.setattr("dsla_hf.inference.recorder.join_weights", seen.append)
    for kind, fuse in (("cuda", True), ("cuda", False), ("cpu", True)):
        Recorder(SimpleNamespace(device=torch.device(kind)), fuse=fuse)
        assert len(seen) == 1


def test_kernels_of_layers_take_parts_of_one_product(tiny_model, adapter_model, counted, interpreted_kernels, products, monkeypatch):
    """Seventeen rows, more than the kernels for few rows take: queries, keys and values are columns of wider results."""
    model = adapter_model(tiny_model("llama", num_hidden_layers=2), conversion_order=[1, 0], level=1)
    join_weights(model)
    monkeypatch.setattr("dsla_kernels.dispatch.choice", "pytorch")
    expected = decode(model, 1, 17)
    with fused(model, counted):
        found = decode(model, 1, 17, lambda: monkeypatch.setattr("dsla_kernels.dispatch.choice", "triton"))
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4)
    assert products
