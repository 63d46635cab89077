"""The description of shapes: what it reads, what it refuses and in which words."""

import pytest
import torch

from dsla_kernels.shapes import NUMBERS, check, check_groups, new_output, table

TABLE = table(
    {
        "q": "B 1 Hq K; fp32, bf16 or fp16",
        "k": "B 1 Hkv K; as q; dense",
        "states": "B Hkv 2 K V; fp32; in place",
        "lengths": "B; int32 or int64",
        "sinks": "Hq; floating-point; optional; (one a head)",
        "mask": "B tokens; optional",
    }
)


def arguments(**changes):
    found = {
        "q": torch.zeros(3, 1, 4, 8),
        "k": torch.zeros(3, 1, 2, 8),
        "states": torch.zeros(3, 2, 2, 8, 5),
        "lengths": torch.zeros(3, dtype=torch.int64),
        "sinks": torch.zeros(4, dtype=torch.float64),
        "mask": torch.zeros(3, 7, dtype=torch.bool),
    }
    return found | changes


def test_the_sizes_of_what_fits():
    sizes = NUMBERS | {"B": 3, "Hq": 4, "K": 8, "Hkv": 2, "V": 5}
    assert check(TABLE, arguments()) == sizes | {"tokens": 7}
    assert check(TABLE, arguments(sinks=None, mask=None, lengths=torch.zeros(3).int())) == sizes


@pytest.mark.parametrize(
    "name, wrong, message",
    [
        ("q", torch.zeros(3, 2, 4, 8), r"^q must be fp32, bf16 or fp16 \[B, 1, Hq, K\] on cpu, got torch.float32 \[3, 2, 4, 8\] on cpu$"),
        ("q", torch.zeros(3, 1, 4, 8).double(), r"^q must be fp32, bf16 or fp16 .* got torch.float64"),
        ("k", torch.zeros(3, 1, 2, 9), r"^k must be torch.float32 \[3, 1, Hkv, 8\] on cpu, got torch.float32 \[3, 1, 2, 9\] on cpu$"),
        ("k", torch.zeros(3, 2, 8), r"^k must be .* got torch.float32 \[3, 2, 8\]"),
        (
            "k",
            torch.zeros(3, 1, 2, 8).half(),
            r"^k must be torch.float32 .* got torch.float16 \[3, 1, 2, 8\] on cpu \(of the dtype of q\)$",
        ),
        ("k", torch.zeros(3, 1, 8, 2).transpose(2, 3), r"^k must be dense .* got strides .*; call contiguous"),
        ("states", torch.zeros(3, 2, 1, 8, 5), r"^states must be fp32 \[3, 2, 2, 8, V\]"),
        ("states", torch.zeros(3, 2, 2, 8, 5, device="meta"), "^states must be fp32 .* on cpu, got .* on meta$"),
        ("states", torch.zeros(3, 2, 2, 5, 8).transpose(3, 4), "^states changes in place and must be contiguous, got strides"),
        ("states", None, "^states must be a tensor, got None"),
        ("lengths", torch.zeros(3), r"^lengths must be int32 or int64 \[3\]"),
        ("lengths", torch.zeros(2).long(), r"^lengths must be .* got torch.int64 \[2\]"),
        ("sinks", torch.zeros(4).int(), r"^sinks must be floating-point \[4\] on cpu, got torch.int32 \[4\] on cpu \(one a head\)$"),
        ("mask", torch.zeros(2, 7), r"^mask must be \[3, tokens\] on cpu, got torch.float32 \[2, 7\]"),
    ],
)
def test_what_does_not_fit_is_named(name, wrong, message):
    with pytest.raises(ValueError, match=message):
        check(TABLE, arguments(**{name: wrong}))


def test_sizes_known_beforehand():
    with pytest.raises(ValueError, match=r"q must be fp32, bf16 or fp16 \[B, 1, 6, K\]"):
        check(TABLE, arguments(), Hq=6)
    assert check(TABLE, arguments(), Hq=4)["Hq"] == 4


def test_a_size_that_only_optional_tensors_have():
    pair = table({"q": "B", "first": "B S; optional", "second": "B S; optional", "third": "S; optional"})
    q, two, three = torch.zeros(4), torch.zeros(4, 2), torch.zeros(4, 3)
    assert check(pair, {"q": q, "first": None, "second": three, "third": None})["S"] == 3
    with pytest.raises(ValueError, match=r"second must be \[4, 2\] on cpu, got torch.float32 \[4, 3\]"):
        check(pair, {"q": q, "first": two, "second": three, "third": None})
    with pytest.raises(ValueError, match=r"third must be \[3\]"):
        check(pair, {"q": q, "first": None, "second": three, "third": torch.zeros(2)})


def test_a_rule_that_there_is_not():
    with pytest.raises(ValueError, match="x has the rule 'fp23'"):
        table({"x": "B T; fp23"})


def test_compiled_code_may_check():
    def run(q, k, states, lengths, sinks, mask):
        check(TABLE, {"q": q, "k": k, "states": states, "lengths": lengths, "sinks": sinks, "mask": mask})
        return q + 1

    found = torch.compile(run, fullgraph=True, backend="eager", dynamic=True)(**arguments())
    assert torch.equal(found, torch.ones(3, 1, 4, 8))


def test_groups_and_outputs():
    check_groups(6, 2)
    for heads, kv_heads in ((6, 4), (6, 0)):
        with pytest.raises(ValueError, match=f"the 6 query heads must be a multiple of the {kv_heads} key-value heads"):
            check_groups(heads, kv_heads)
    o = new_output(torch.zeros(2, 3, 4, 8).half(), torch.zeros(2, 3, 1, 5))
    assert o.shape == (2, 3, 4, 5) and o.dtype == torch.float16
