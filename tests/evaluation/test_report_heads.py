"""`dsla eval` and `dsla report` of levels that count heads, and the picture of heads by layer."""

import json
import re

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dsla_cli import main
from dsla_hf import DSLAConfig
from dsla_hf.cli.quickstart import train_tokenizer
from dsla_hf.evaluation.report.heads import draw_heads, places
from dsla_hf.evaluation.report.measurements import read_measurements
from dsla_hf.evaluation.report.page import report

pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'dsla-hf[plot]'")

ORDER = [[2, 0], [0, 1], [3, 0], [3, 1], [1, 1], [0, 0], [2, 1]]  # of 4 layers with 2 KV heads: 1.0 is in no plan
SIZES = {"num_hidden_layers": 4, "num_key_value_heads": 2}
TEXT = " ".join(f"{number} green bottles hang on the wall, and if one of them should fall" for number in range(99, 0, -1))


@pytest.fixture
def drawn(monkeypatch):
    """The matplotlib figures that are drawn."""
    from matplotlib.figure import Figure

    kept, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **options: (kept.append(figure), save(figure, *args, **options))[1])
    return kept


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base with its tokenizer, an adapter of heads at level 3, and its hybrid."""
    from peft import get_peft_model

    folder = tmp_path_factory.mktemp("made")
    tokenizer = train_tokenizer([TEXT], vocab_size=320)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "head_dim": 8, "vocab_size": len(tokenizer), **SIZES}
    base = LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.2, bos_token_id=None, eos_token_id=None))
    base.save_pretrained(folder / "base")
    plan = DSLAConfig(task_type="CAUSAL_LM", window_size=8, conversion_unit="head", conversion_order=ORDER, level=3)
    model = get_peft_model(base, plan)
    model.save_pretrained(folder / "adapter")
    model.merge_and_unload().save_pretrained(folder / "hybrid")
    for name in ("base", "hybrid"):
        tokenizer.save_pretrained(folder / name)
    return folder


def rows_file(path, rows):
    path.write_text(json.dumps({"command": "python measure.py", "rows": rows}))
    return str(path)


def cells(text, beginning):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith(f"| {beginning} |")]


def axis_labels(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


# --- from the model to the page -----------------------------------------------------------------------------------


def test_eval_and_report_of_an_adapter_of_heads(made, tmp_path, capsys, drawn):
    options = ["--tasks", "far_bigrams", "--lengths", "96", "--limit", "2", "--dtype", "float32"]
    adapter = ["--model", made / "base", "--adapter", made / "adapter"]
    assert main(["eval", *adapter, "--levels", "0,3,kept:1", *options, "--output", tmp_path / "mine"]) == 0
    printed = capsys.readouterr().out
    named = [f"level {level} (KV heads kept: {8 - level})" for level in (0, 3, 7)]
    assert f"{named[1]}: far_bigrams" in printed
    assert re.search("^task +metric +" + " +".join(map(re.escape, named)) + "$", printed, re.M)
    assert re.search(r"^cache +bytes_2k +1,048,576 ", printed, re.M)
    assert main(["eval", "--model", made / "hybrid", *options, "--output", tmp_path / "hybrid"]) == 0
    files = [json.loads((tmp_path / folder / "level-03.json").read_text()) for folder in ("mine", "hybrid")]
    assert all(file["kept"] == 5 for file in files) and files[0]["tasks"]["cache"] == files[1]["tasks"]["cache"]

    page = tmp_path / "page.md"
    assert main(["report", tmp_path / "mine", "--adapter", made / "adapter", "--level", "kept:2", "--out", page]) == 0
    text = page.read_text()
    assert "at level L its L least harmful KV heads, with the query heads that read them, are DSLA." in text
    names = ["KV heads kept: 8 (100%), original", "KV heads kept: 5 (62.5%), level 3", "KV heads kept: 1 (12.5%), level 7"]
    assert cells(text, "metric")[0] == ["metric", *names]
    assert cells(text, "bytes_2k ↓")[0][1] == "1,048,576" and len(cells(text, "bytes_32k ↓")[0]) == 4
    assert "at level 6." in text and "](page-heads.png)" in text and (tmp_path / "page-heads.png").read_bytes().startswith(b"\x89PNG")
    quality = drawn[-1].axes[0]
    assert quality.get_xlabel() == "KV heads kept" and quality.xaxis_inverted() and axis_labels(quality.xaxis) == ["1", "5", "8"]


def test_a_base_alone_says_nothing_of_heads(made, tmp_path, capsys):
    options = ["--tasks", "far_bigrams", "--lengths", "96", "--limit", "1", "--dtype", "float32"]
    assert main(["eval", "--model", made / "base", *options, "--output", tmp_path / "base"]) == 0
    file = json.loads((tmp_path / "base" / "level-00.json").read_text())
    assert "kept" not in file and "cache" not in file["tasks"] and "kept" not in capsys.readouterr().out


# --- tables of rows -----------------------------------------------------------------------------------------------

HEADS = [{"arm": "heads", "level": level, "kept": 90 - level, "kl": level / 100} for level in (0, 45, 81)]


def test_layers_whose_heads_are_known_stand_at_the_heads_they_keep(tmp_path, drawn):
    layers = [{"arm": "layers", "level": level, "kept": 90 - 3 * level, "kl": level / 10} for level in (0, 15, 27)]
    base = [{"arm": "base", "level": 0, "kl": 0.0, "ppl": 3.0}]
    text = report([rows_file(tmp_path / "a.json", [*HEADS, *layers, *base])], str(tmp_path / "page.md"))
    names = ["KV heads kept: 90 (100%), original", "KV heads kept: 45 (50%)", "KV heads kept: 9 (10%)"]
    assert cells(text, "metric")[0] == ["metric", "arm", *names]
    assert [row[1:] for row in cells(text, "kl ↓")] == [
        ["heads", "0", "0.45", "0.81"],
        ["layers", "0", "1.5", "2.7"],
        ["base", "0", "", ""],
    ]
    assert "at level L its L least harmful layers, or KV heads, with the query heads that read them, are DSLA." in text
    (axes,) = (axes for axes in drawn[0].axes if axes.axison)
    assert axis_labels(axes.xaxis) == ["9", "45", "90"]
    for container, name in zip(axes.containers, ("heads", "layers"), strict=True):
        assert container.get_label() == name and list(container[0].get_xdata()) == [9, 45, 90]


def test_layers_whose_heads_are_not_known_stand_apart(tmp_path, drawn):
    layers = [{"arm": "layers", "level": level, "kl": level / 10} for level in (0, 2, 4)]
    base = [{"arm": "base", "level": 0, "kl": 0.5}]
    files = [rows_file(tmp_path / f"{name}.json", rows) for name, rows in (("h", HEADS), ("l", layers), ("b", base))]
    text = report(files, str(tmp_path / "page.md"))
    apart, heads = text.split("By KV heads kept:")
    assert "By layers converted:" in apart and cells(apart, "metric")[0][-3:] == ["level 0, original", "level 2", "level 4"]
    assert cells(heads, "metric")[0][-1] == "KV heads kept: 9 (10%), level 81"
    assert "](page-quality.png)" in apart and "](page-quality-heads.png)" in heads
    assert [figure.axes[0].get_xlabel() for figure in drawn] == ["level", "KV heads kept"]
    assert apart.count("base") > 0 and "| kl ↓ | 0.5 |" in heads.replace(" | base", "")


def test_many_levels_of_heads_become_rows(tmp_path):
    rows = [{"level": level, "kept": 20 - level, "kl": level} for level in range(21)]
    text = report([rows_file(tmp_path / "a.json", rows)], str(tmp_path / "page.md"))
    assert cells(text, "KV heads kept") == [["KV heads kept", "kl ↓"]]
    assert cells(text, "20 (100%), original") and cells(text, "2 (10%), level 18") == [["2 (10%), level 18", "18"]]


@pytest.mark.parametrize("kept", [-1, "9", 2.5])
def test_what_is_no_number_of_heads_is_refused(kept, tmp_path):
    with pytest.raises(ValueError, match="row 2: `kept` is no number of KV heads"):
        read_measurements(rows_file(tmp_path / "a.json", [{"level": 0, "a": 1}, {"level": 1, "kept": kept, "a": 1}]))


# --- the picture --------------------------------------------------------------------------------------------------


def config(level, **more):
    return DSLAConfig(**{"conversion_unit": "head", "conversion_order": ORDER, "base_dimensions": SIZES, **more}, level=level)


def is_orange(colour):
    return colour[0] > colour[2]


@pytest.mark.parametrize("level", [0, 3, 7])
def test_kept_heads_are_orange_and_each_shows_its_place(level):
    figure = draw_heads(config(level))
    (axes,) = figure.axes
    (image,) = axes.images
    grid = image.get_array()
    assert grid.shape[:2] == (2, 4) and (axes.get_xlabel(), axes.get_ylabel()) == ("layer", "KV head")
    converted = {tuple(unit) for unit in ORDER[:level]}
    assert all(is_orange(grid[head, layer]) == ((layer, head) not in converted) for layer in range(4) for head in range(2))
    assert {(text.get_position(), text.get_text()) for text in axes.texts} == {(tuple(unit), str(i)) for i, unit in enumerate(ORDER, 1)}
    assert axis_labels(axes.xaxis) == ["0", "1", "2", "3"] and axis_labels(axes.yaxis) == ["0", "1"]
    said = [text.get_text() for text in figure.legends[0].get_texts()]
    assert said[0] == f"level {level} keeps {8 - level} of 8 KV heads ({100 * (8 - level) / 8:.3g}%)"
    assert said[-1] == "kept at every level: not in the order" and len(said) == 2 + (level > 0)


def test_later_ones_are_darker():
    def light(grid, unit):
        return sum(grid[unit[1], unit[0]])

    (axes,) = draw_heads(config(4)).axes
    grid = axes.images[0].get_array()
    for part in (ORDER[:4], ORDER[4:]):
        shades = [light(grid, unit) for unit in part]
        assert shades == sorted(shades, reverse=True) and len(set(shades)) == len(shades)
    assert light(grid, (1, 0)) < light(grid, ORDER[-1]), "what is in no plan"


def test_a_plan_of_layers_is_drawn_by_whole_layers():
    layers = config(1, conversion_unit="layer", conversion_order=[2, 0])
    assert places(layers) == {(2, 0): 1, (2, 1): 1, (0, 0): 2, (0, 1): 2}
    grid = draw_heads(layers).axes[0].images[0].get_array()
    assert [[not is_orange(cell) for cell in row] for row in grid] == [[False, False, True, False]] * 2


@pytest.mark.parametrize("level", [0, 3])
def test_layers_without_attention_to_convert_are_drawn_apart_and_count_as_no_heads(level):
    order = [[1, 0], [3, 1], [1, 1]]
    sizes = {**SIZES, "convertible_layers": [1, 3]}
    figure = draw_heads(config(level, conversion_order=order, base_dimensions=sizes))
    grid = figure.axes[0].images[0].get_array()
    kept = {(layer, head) for layer in (1, 3) for head in (0, 1)} - set(map(tuple, order[:level]))
    for layer, head in ((layer, head) for layer in range(4) for head in range(2)):
        red, _, blue, _ = grid[head, layer]
        assert (red == blue) == (layer in (0, 2)) and is_orange(grid[head, layer]) == ((layer, head) in kept)
    said = [text.get_text() for text in figure.legends[0].get_texts()]
    assert said[0] == f"level {level} keeps {4 - level} of 4 KV heads ({100 * (4 - level) / 4:.3g}%)"
    assert said[-2:] == ["kept at every level: not in the order", "layers without attention that could be converted"]
    whole = draw_heads(config(level, conversion_order=[*order, [3, 0]], base_dimensions=sizes))
    assert "kept at every level: not in the order" not in [text.get_text() for text in whole.legends[0].get_texts()]


def test_large_models_have_no_numbers_and_fit():
    order = [[layer, head] for layer in range(80) for head in range(8)]
    figure = draw_heads(config(500, conversion_order=order, base_dimensions={"num_hidden_layers": 80, "num_key_value_heads": 8}))
    assert not figure.axes[0].texts and max(figure.get_size_inches()) < 13


def test_a_plan_of_no_model_is_refused():
    with pytest.raises(ValueError, match="no base_dimensions"):
        draw_heads(config(1, base_dimensions=None))


def test_the_picture_alone_needs_no_results(made, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert main(["report", "--adapter", made / "adapter", "--out", page]) == 0
    assert "Heads by layer" in page.read_text() and "at level 3." in page.read_text()
    for more, words in (
        ([], "nothing to show"),
        (["--level", "3"], "name the --adapter"),
        (["--adapter", made / "adapter", "--level", "8"], "level 8"),
        (["--adapter", made / "base"], "is not an adapter"),
    ):
        assert main(["report", *more, "--out", tmp_path / "other.md"]) == 1
        assert words in capsys.readouterr().err and not list(tmp_path.glob("other*"))
