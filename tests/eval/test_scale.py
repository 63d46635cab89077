"""Speed and memory at size: counts of operations and weights, rows, the plan on paper, and a run at a tiny shape."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

EVAL = Path(__file__).resolve().parents[2] / "eval"


@pytest.fixture(scope="module")
def modules():
    """eval/'s operations, scale_plan and scale, imported as the script does."""
    before, known = list(sys.path), set(sys.modules)
    sys.path.insert(0, str(EVAL))
    import operations
    import scale
    import scale_plan

    yield operations, scale_plan, scale
    sys.path[:] = before
    for name in set(sys.modules) - known:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == EVAL:
            del sys.modules[name]


@pytest.fixture
def model(modules):
    operations, _, scale = modules
    return scale.make_model(operations.SHAPES["tiny"], torch.device("cpu")).float()


def row(stage, processes=1, **values):
    content = {"shape": "8b", "stage": stage, "processes": processes, "kind": "one", "batch": 1, "length": 4096, "checkpointing": False}
    numbers = {"tokens_per_second": 4000.0, "share_of_floor": 0.5, "peak_gib": 60.0, "matmul_rate": 7e14}
    return {**content, **numbers, **values}


# --- counts -----------------------------------------------------------------------------------------------------


def test_weights_are_those_of_the_model(modules, model):
    operations = modules[0]
    x = operations.SHAPES["tiny"]
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    assert sum(size for name, size in sizes.items() if "dsla_" not in name) == operations.frozen_weights(x)
    assert sum(size for name, size in sizes.items() if "dsla_" in name) == x.layers * operations.trained_weights(x)


@pytest.mark.parametrize("name, billions", [("1b", 1.24), ("8b", 8.03), ("70b", 70.55)])
def test_shapes_have_the_sizes_in_their_names(modules, name, billions):
    operations = modules[0]
    assert operations.frozen_weights(operations.SHAPES[name]) == pytest.approx(billions * 1e9, rel=0.005)


def test_operations_of_the_teacher_are_those_that_torch_counts(modules, model):
    operations = modules[0]
    x, ids = operations.SHAPES["tiny"], torch.randint(0, 512, (2, 64))
    model.get_base_model().set_attn_implementation("eager")  # products that torch counts on the CPU
    with FlopCounterMode(display=False) as counted, torch.no_grad(), model.disable_adapter():
        model(input_ids=ids, use_cache=False)
    # torch counts causal attention as if every token saw every other.
    not_causal = 2 * x.layers * 4 * 64 * (64 - 65 / 2) * x.heads * x.head
    assert operations.teacher_operations(x, 128, 64) + not_causal == pytest.approx(counted.get_total_flops(), rel=1e-3)


@pytest.mark.parametrize("converted", [[0, 1, 2, 3], [2], [1, 3]])
def test_operations_of_matrices_in_stage_2_are_those_that_torch_counts(modules, model, converted):
    """Attention aside, which the implementation may do with other products than those that are needed."""
    operations = modules[0]
    x, ids = operations.SHAPES["tiny"], torch.randint(0, 512, (1, 64))
    with model.base_model.converted(converted), FlopCounterMode(display=False) as counted:
        with torch.no_grad(), model.disable_adapter():
            model(input_ids=ids, use_cache=False)
        model(input_ids=ids, use_cache=False).logits.float().square().mean().backward()
    found = sum(n for op, n in counted.get_flop_counts()["Global"].items() if str(op) in ("aten.mm", "aten.addmm"))
    w, lowest = operations.projection_weights(x), min(converted)
    expected = 2 * 2 * x.layers * sum(w.values()) + 3 * 2 * x.hidden * x.vocabulary  # two forwards, and the head's way back
    expected += 2 * len(converted) * (w["q"] + w["o"])
    expected += 2 * (sum(w.values()) * (x.layers - lowest - 1) + w["mlp"] + w["o"])
    assert found == 64 * expected
    attention = operations.logits_operations(x, 64, 64, converted) - 64 * expected
    assert attention > 0


def test_alignment_needs_less_than_stage_2_and_more_than_its_teacher(modules):
    operations = modules[0]
    for name in ("1b", "8b", "70b"):
        x = operations.SHAPES[name]
        teacher = operations.teacher_operations(x, 4096, 4096, head=False)
        alignment, logits = operations.alignment_operations(x, 4096, 4096), operations.logits_operations(x, 4096, 4096, range(x.layers))
        assert teacher < alignment < 2 * teacher < logits < 4 * teacher
        assert operations.logits_operations(x, 4096, 4096, [x.layers - 1]) < logits


# --- the plan ---------------------------------------------------------------------------------------------------


def test_plan_on_paper(modules):
    operations, scale_plan, _ = modules
    x = operations.SHAPES["70b"]
    memory = scale_plan.memory_per_gpu(x, 64, 4096)
    assert memory["frozen weights, cut"] == pytest.approx(2 * 70.55e9 / 64, rel=0.01)
    assert memory["inputs of the blocks, and targets or logits"] == 2 * 2 * 80 * 4096 * 8192
    traffic = scale_plan.traffic_per_step(x, 64)
    assert traffic["logits"] > traffic["alignment"] > 2 * 2 * 68e9 * 63 / 64


def test_plan_has_times_only_where_they_were_measured(modules):
    _, scale_plan, _ = modules

    def missing(rows):
        return [entry["what"] for entry in scale_plan.plan(rows, 50e9) if entry["value"] == scale_plan.MISSING]

    assert len(missing([])) == 4 and len(missing([row("alignment")])) == 3
    assert len(missing([row("alignment"), row("logits", processes=2)])) == 3
    assert not missing([row("alignment"), row("logits")])


def test_plan_follows_the_measured_rows(modules):
    _, scale_plan, _ = modules

    def hours(share, bandwidth=1e30):
        rows = [row("alignment", share_of_floor=share), row("logits", share_of_floor=share)]
        values = {entry["what"]: entry["value"] for entry in scale_plan.plan(rows, bandwidth)}
        return float(values["GPU-hours for 1 B tokens, half in each stage"].replace(",", ""))

    assert hours(0.25) == pytest.approx(2 * hours(0.5), rel=0.01)
    assert hours(0.5, bandwidth=1e9) > 10 * hours(0.5)


def test_page_is_filled_and_drawn(modules, tmp_path):
    pytest.importorskip("matplotlib")
    _, scale_plan, _ = modules
    page = tmp_path / "scale.md"
    page.write_text((EVAL.parent / "docs" / "scale.md").read_text())
    rows = [row("alignment"), row("alignment", processes=2, kind="ddp", tokens_per_second=7600.0, peak_gib=None)]
    scale_plan.write_page(rows, 50e9, page)
    text = page.read_text()
    assert "| 1.9 |" in text and "70B on 64 GPUs" in text and (tmp_path / "images" / "scale.png").exists()
    scale_plan.write_page([], 50e9, page)
    assert "Nothing measured yet." in page.read_text() and "scale.png" not in page.read_text()


# --- measuring --------------------------------------------------------------------------------------------------


def test_run_at_a_tiny_shape_writes_its_rows(modules, tmp_path, capsys):
    scale = modules[2]
    options = ["--shapes", "tiny", "--steps", "2", "--length", "64", "--results", str(tmp_path)]
    scale.main(options)
    scale.main([*options, "--stages", "logits", "--gradient-checkpointing"])
    scale.main([*options, "--stages", "alignment"])  # in place of the first
    rows = json.loads((tmp_path / "scale.json").read_text())["rows"]
    assert [(r["stage"], r["checkpointing"]) for r in rows] == [("alignment", False), ("logits", False), ("logits", True)]
    for found in rows:
        assert (
            found["processes"] == 1 and found["kind"] == "one" and found["tokens_per_second"] == pytest.approx(64 / found["step_seconds"])
        )
        assert 0 < found["share_of_floor"] < 1
        parts = found["stage"] == "alignment"
        assert ("share_of_parts" in found) == parts
    assert "| tiny | alignment | 1 | one | 1 | False |" in capsys.readouterr().out


def test_out_of_memory_is_tried_again_with_checkpointing(modules, tmp_path, monkeypatch, capsys):
    scale = modules[2]
    tried = []

    def measure(name, model, stage, checkpointing, options, rate):
        tried.append((stage, checkpointing))
        if not checkpointing or stage == "logits":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return row(stage, shape=name, checkpointing=checkpointing)

    monkeypatch.setattr(scale, "measure", measure)
    scale.main(["--shapes", "tiny", "--results", str(tmp_path)])
    assert tried == [(stage, checkpointing) for stage in ("alignment", "logits") for checkpointing in (False, True)]
    assert len(json.loads((tmp_path / "scale.json").read_text())["rows"]) == 1
    assert capsys.readouterr().out.count("out of memory") == 3


def test_unknown_shape_is_refused(modules, capsys):
    with pytest.raises(SystemExit):
        modules[2].parse_arguments(["--shapes", "900b"])
    assert "invalid choice: '900b'" in capsys.readouterr().err
