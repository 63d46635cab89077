"""What a token's kernels refuse before they run, and what their operators say of themselves. No launch, and so no GPU."""

import pytest
import torch

pytest.importorskip("triton")

from dsla_kernels.ops.decode import GateWeights, pure_decode, window_decode
from dsla_kernels.ops.decode import launch as decode_launch
from dsla_kernels.ops.decode.step import PureStep, WindowStep


def arguments(decays=8):
    """Of three rows, six query heads on two, heads of 8 and 12 channels, a window of 4 and a sink."""
    rank = 5
    down, up, bias = torch.zeros(2, 12, rank), torch.zeros(2, rank, 2 * decays), torch.zeros(2, 2, decays)
    gates = GateWeights(down, up, bias, torch.zeros(2, 12, 2), torch.zeros(2, 2))
    return {
        "q": torch.zeros(3, 1, 6, 8),
        "k": torch.zeros(3, 1, 2, 8),
        "v": torch.zeros(3, 1, 2, 12),
        "recurrent": torch.zeros(3, 2, 2, 8, 12),
        "window_k": torch.zeros(3, 5, 2, 8),
        "window_v": torch.zeros(3, 5, 2, 12),
        "lengths": torch.zeros(3, dtype=torch.int64),
        "gates": gates,
        "mix_logits": torch.zeros(6, 2),
        "norm_weight": torch.zeros(6, 12),
        "state_gain": torch.zeros(6),
        "state_bias": torch.zeros(6),
        "window_size": 4,
    }


WINDOW_ALONE = ("window_k", "window_v", "lengths", "state_gain", "state_bias", "window_size")


def gate(**changes):
    return lambda gates: gates._replace(**{name: edit(getattr(gates, name)) for name, edit in changes.items()})


WRONG = {
    "two tokens": ({"q": lambda x: x.expand(-1, 2, -1, -1)}, r"^q must be fp32, bf16 or fp16 \[B, 1, Hq, K\]"),
    "three dimensions": ({"v": lambda x: x[0]}, "^v must be"),
    "fp64": ({"q": torch.Tensor.double}, "^q must be fp32, bf16 or fp16 .* got torch.float64"),
    "a dtype each": ({"k": torch.Tensor.half}, "^k must be torch.float32 .* got torch.float16"),
    "rows": ({"v": lambda x: x[:2]}, r"^v must be torch.float32 \[3, 1, 2, V\]"),
    "states": (
        {"recurrent": lambda x: x[:, :, :1]},
        r"^recurrent must be fp32 \[3, 2, 2, 8, 12\] on cpu, got torch.float32 \[3, 2, 1, 8, 12\]",
    ),
    "states of another type": ({"recurrent": torch.Tensor.half}, "^recurrent must be fp32"),
    "strided states": ({"recurrent": lambda x: x.mT.contiguous().mT}, "^recurrent changes in place and must be contiguous"),
    "gates": ({"gates": gate(down=lambda x: x[:, :11])}, r"^gates.down must be fp32, bf16 or fp16 \[2, 12, rank\]"),
    "rank": ({"gates": gate(up=lambda x: x[:, :4])}, r"^gates.up must be fp32, bf16 or fp16 \[2, 5, 16\]"),
    "decays": ({"gates": gate(bias=lambda x: x[..., :5], up=lambda x: x[..., :10])}, "^gates.bias must have 8 or 4 decays a state, got 5"),
    "decays alone": ({"gates": gate(bias=lambda x: x[..., :5])}, "^gates.bias must have 8 or 4 decays a state, got 5"),
    "half a write gate": ({"gates": gate(write_bias=lambda x: None)}, "^gates.write_weight and gates.write_bias must be given together"),
    "mix": ({"mix_logits": lambda x: x[:, :1]}, r"^mix_logits must be fp32, bf16 or fp16 \[6, 2\]"),
    "norm": ({"norm_weight": lambda x: x.long()}, "^norm_weight must be fp32, bf16 or fp16 .* got torch.int64"),
    "elsewhere": ({"mix_logits": lambda x: x.to("meta")}, "^mix_logits must be .* on cpu, got .* on meta"),
    "mask": ({"padding_mask": lambda x: torch.ones(2, 1)}, r"^padding_mask must be \[3, tokens\]"),
    "numbers of heads": (
        {"kv_heads": lambda x: torch.zeros(3, dtype=torch.int32)},
        r"^kv_heads must be int32 \[2\] .* got torch.int32 \[3\]",
    ),
    "heads of another type": (
        {"kv_heads": lambda x: torch.zeros(2, dtype=torch.int64)},
        r"^kv_heads must be int32 \[2\] .* got torch.int64",
    ),
    "output": ({"out": lambda x: torch.zeros(3, 1, 5, 12)}, r"^out must be torch.float32 \[3, 1, 6, 12\]"),
    "every other head": ({"out": lambda x: torch.zeros(3, 1, 12, 12)[:, :, ::2]}, "^out must have the heads of a row side by side"),
}
WRONG_PURE = {
    "heads": ({"q": lambda x: x[:, :, :5], "mix_logits": lambda x: x[:5], "norm_weight": lambda x: x[:5]}, "the 5 query heads must be"),
}
WRONG_WINDOW = {
    "odd": ({"window_size": lambda x: 5}, "^window_size must be an even number of tokens, got 5"),
    "few slots": ({"window_size": lambda x: 6}, "^window_k must have 6 slots and at most 3 for sinks, got 5"),
    "many slots": ({"window_size": lambda x: 2}, "^window_k must have 2 slots and at most 1 for sinks, got 5"),
    "slots": ({"window_v": lambda x: x[:, :4]}, r"^window_v must be torch.float32 \[3, 5, 2, 12\]"),
    "a ring of another type": ({"window_k": torch.Tensor.half}, "^window_k must be torch.float32"),
    "strided ring": ({"window_k": lambda x: x.mT.contiguous().mT}, "^window_k changes in place and must be contiguous"),
    "lengths": ({"lengths": torch.Tensor.int}, r"^lengths must be int64 \[3\]"),
    "gain": ({"state_gain": lambda x: x[:5]}, r"^state_gain must be fp32, bf16 or fp16 \[6\]"),
    "cap": ({"softcap": lambda x: -1.0}, "^softcap must be positive"),
    "sink": ({"sink_logits": lambda x: torch.zeros(5)}, r"^sink_logits must be fp32, bf16 or fp16 \[6\]"),
}


WRONG_HELD = {
    "more heads": ({"recurrent": lambda x: x.repeat(1, 2, 1, 1, 1)}, r"^recurrent must be fp32 \[3, 2, 2, 8, 12\]"),
    "which heads": ({"state_heads": lambda x: torch.zeros(3, dtype=torch.int32)}, r"^state_heads must be int32 \[2\]"),
}
WRONG_HELD_RING = {
    "a ring of fewer heads": (
        {"recurrent": lambda x: x.repeat(1, 2, 1, 1, 1), "state_heads": lambda x: torch.zeros(2, dtype=torch.int32)},
        r"^window_k must be torch.float32 \[3, slots, 4, 8\]",
    ),
}
CASES = {"window": WRONG | WRONG_WINDOW | WRONG_HELD | WRONG_HELD_RING, "pure": WRONG | WRONG_PURE | WRONG_HELD}


@pytest.mark.parametrize("form, case", [(form, case) for form, cases in CASES.items() for case in cases])
def test_wrong_inputs_are_named_before_a_launch(form, case, monkeypatch):
    monkeypatch.setattr(torch.ops.dsla_kernels, "window_decode", None)
    monkeypatch.setattr(torch.ops.dsla_kernels, "pure_decode", None)
    changes, message = CASES[form][case]
    given = arguments()
    if form == "pure":
        given = {name: x for name, x in given.items() if name not in WINDOW_ALONE}
    given |= {name: edit(given.get(name)) for name, edit in changes.items()}
    with pytest.raises(ValueError, match=message):
        (window_decode if form == "window" else pure_decode)(**given)


def test_heads_beyond_what_the_kernels_take():
    gates = GateWeights(torch.zeros(1, 258, 2), torch.zeros(1, 2, 8), torch.zeros(1, 2, 4))
    q, recurrent = torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, 2, 8, 258)
    with pytest.raises(ValueError, match="up to 256 channels, got K = 8, V = 258"):
        pure_decode(q, q, torch.zeros(1, 1, 1, 258), recurrent, gates, torch.zeros(1, 2), torch.zeros(1, 258))


@pytest.mark.parametrize(
    "name, step, changed",
    [("pure_decode", PureStep, {"recurrent", "out"}), ("window_decode", WindowStep, {"recurrent", "window_k", "window_v", "out"})],
)
def test_an_operator_takes_the_fields_of_its_step_and_says_what_it_changes(name, step, changed):
    schema = getattr(torch.ops.dsla_kernels, name).default._schema
    assert [argument.name for argument in schema.arguments] == [*step._fields]
    assert {argument.name for argument in schema.arguments if argument.alias_info and argument.alias_info.is_write} == changed


def test_the_launch_follows_the_shape_and_what_measurements_want(monkeypatch):
    """A few heads are shared by several programs, many are not; a choice by hand goes before both."""
    monkeypatch.setattr(decode_launch, "processors", lambda device: 132)
    monkeypatch.setattr(decode_launch, "can_overlap", lambda device: False)
    given = arguments()
    tensors = [given[name] for name in ("q", "k", "v", "recurrent")], given["gates"], [given["mix_logits"], given["norm_weight"]]

    def parts(rows, **wanted):
        monkeypatch.setattr(decode_launch, "tuned", decode_launch.Launch(4, 16, **wanted) if wanted else None)
        token, gates, weights = tensors
        step = PureStep(
            *(x.repeat(rows, *[1] * (x.ndim - 1)) for x in token), None, None, *gates, *weights, *(None,) * 4, 16.0, -1.25, 1.0, 1e-6
        )
        wide = step._replace(q=step.q.repeat(1, 1, 1, 16), v=step.v.repeat(1, 1, 1, 10))
        return decode_launch.plan_pure(wide).head.PARTS

    assert parts(1) == 8 and parts(100) == 1 and parts(100, parts=2) == 2
