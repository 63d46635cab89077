"""`dsla report`: what a page says of result files, and what it refuses."""

import base64
import json
import re
from urllib.parse import unquote

import pytest

from dsla_cli import main
from dsla_hf.evaluation.report import published as paper
from dsla_hf.evaluation.report.measurements import read_measurements
from dsla_hf.evaluation.report.page import report

pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'dsla-hf[plot]'")

VERSIONS = {"python": "3.11", "torch": "2.9", "lm-eval": None}


def save_level(folder, level, **tasks):
    folder.mkdir(parents=True, exist_ok=True)
    content = {"level": level, "tasks": tasks, "command": f"dsla eval --levels {level}", "versions": VERSIONS, "device": "cpu"}
    (folder / f"level-{level:02d}.json").write_text(json.dumps(content))


def save_rows(file, rows, **more):
    file.write_text(json.dumps({"command": "python measure.py", "versions": VERSIONS, "device": "GPU", **more, "rows": rows}))
    return str(file)


@pytest.fixture
def results(tmp_path):
    """A folder of `dsla eval` with levels 0, 2, 4."""
    for level in (0, 2, 4):
        needle = {"accuracy@512": 1 - level / 10, "accuracy@1024": 1 - level / 5}
        far = {"loss@512[new]": 3.0, "loss@512[128-255 back]": 2 + level, "loss@512[256-511 back]": 2.5 + level}
        save_level(tmp_path / "mine", level, piqa={"acc": 0.6, "acc_stderr": 0.0123}, needle=needle, far_bigrams=far)
    return tmp_path / "mine"


def page(tmp_path, *results, name="page.md", **more):
    text = report(list(map(str, results)), str(tmp_path / name), **more)
    assert (tmp_path / name).read_text() == text
    return text


def cells(text, beginning):
    """The cells of the Markdown rows that begin so."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith(f"| {beginning} |")]


def figures(text, folder):
    """Those inside an HTML page, those that a Markdown page links."""
    found = [base64.b64decode(image) for image in re.findall(r"data:image/png;base64,([\w+/=]+)", text)]
    found += [(folder / unquote(name)).read_bytes() for name in re.findall(r"^!\[[^\]]*\]\((?!data:)([^)]+)\)", text, re.MULTILINE)]
    assert all(image.startswith(b"\x89PNG") for image in found)
    return found


@pytest.fixture
def drawn(monkeypatch):
    """The matplotlib figures that are drawn."""
    from matplotlib.figure import Figure

    kept, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **options: (kept.append(figure), save(figure, *args, **options))[1])
    return kept


def labels(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


# --- reading ----------------------------------------------------------------------------------------------------


def test_folder_file_and_rows_are_read(results, tmp_path):
    measured, sources = read_measurements(str(results))
    assert {(m.arm, m.level) for m in measured} == {("mine", 0), ("mine", 2), ("mine", 4)} and len(sources) == 3
    piqa = next(m for m in measured if m.task == "piqa" and m.level == 2)
    assert (piqa.metric, piqa.value, piqa.error) == ("acc", 0.6, 0.0123)
    named, _ = read_measurements(f"other={results / 'level-02.json'}")
    assert {(m.arm, m.level) for m in named} == {("other", 2)}
    assert {m.arm for m in read_measurements(str(results / "level-02.json"))[0]} == {"mine"}


def test_rows_have_arms_lengths_and_seeds(tmp_path):
    rows = [{"arm": "a", "level": 4, "seed": seed, "ppl": 10.0 + seed, "note": "x", "ok": True, "by_length": [1]} for seed in (0, 2)]
    rows += [{"level": 4, "task": "decoding", "length": 512, "batch_size": 8, "ms": 1.5, "ms_stderr": 0.1, "nothing": float("nan")}]
    measured, _ = read_measurements(f"name={save_rows(tmp_path / 'table.json', rows)}")
    assert [(m.arm, m.level, m.task, m.metric, m.value) for m in measured] == [
        ("a", 4, "table", "ppl", 11.0),
        ("name", 4, "decoding", "ms@512 batch 8", 1.5),
    ]
    assert measured[0].error == pytest.approx(2**0.5)


def test_path_with_an_equals_sign(tmp_path):
    save_level(tmp_path / "a=b", 0, piqa={"acc": 0.5})
    assert read_measurements(str(tmp_path / "a=b"))[0][0].arm == "a=b"


# --- the page ---------------------------------------------------------------------------------------------------


def test_one_adapter(results, tmp_path):
    text = page(tmp_path, results)
    assert cells(text, "metric")[0] == ["metric", "level 0, original", "level 2", "level 4"]
    assert cells(text, "acc ↑") == [["acc ↑", *["0.6 ± 0.012"] * 3]]
    assert cells(text, "accuracy@1024 ↑") == [["accuracy@1024 ↑", "1", "0.6", "0.2"]]
    assert len(figures(text, tmp_path)) == 1 and "Not measured (--speed FILE)." in text
    assert "far_bigrams: loss" in text
    assert "```console\ndsla eval --levels 2\n```" in text and "python 3.11, torch 2.9 |" in text


def test_a_table_says_where_the_window_holds_all_texts(results, tmp_path):
    said = "fits into the window"
    assert said not in page(tmp_path, results)
    for level in (0, 2, 4):
        file = results / f"level-{level:02d}.json"
        more = {"longest_text": {"piqa": 120}, "window": 128 if level else None}
        file.write_text(json.dumps(json.loads(file.read_text()) | more))
    text = page(tmp_path, results)
    assert text.count(said) == 1
    assert (
        "### piqa\n\nIts longest text (120 tokens) fits into the window (128), which alone reads it: this says nothing of states.\n\n|"
        in text
    )
    file = results / "level-04.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"window": 64}))
    assert said not in page(tmp_path, results)


def test_beside_others_and_speed(results, tmp_path):
    rows = [{"arm": arm, "level": level, "novels": 20 + level} for arm in ("one state", "control") for level in (2, 4)]
    speed = save_rows(tmp_path / "fast.json", [{"arm": "mine", "level": level, "length": 4096, "ms": 9 - level} for level in (0, 2, 4)])
    save_level(tmp_path / "other", 2, piqa={"acc": 0.5})
    text = page(tmp_path, results, tmp_path / "other", save_rows(tmp_path / "rows.json", rows), speed=[speed], title="My | title")
    assert text.startswith("# My | title\n") and len(figures(text, tmp_path)) == 2
    assert cells(text, "acc ↑") == [["acc ↑", "mine", *["0.6 ± 0.012"] * 3], ["acc ↑", "other", "", "0.5", ""]]
    assert cells(text, "novels") == [["novels", "one state", "22", "24"], ["novels", "control", "22", "24"]]
    assert cells(text, "ms@4096 ↓") == [["ms@4096 ↓", "9", "7", "5"]]
    assert text.index("## Quality") < text.index("novels") < text.index("## Speed") < text.index("ms@4096") < text.index("## How it")


def test_the_base_alone_is_one_sentence_where_it_is_level_0(results, tmp_path):
    same = json.loads((results / "level-00.json").read_text())["tasks"]
    save_level(tmp_path / "base", 0, **same)
    text = page(tmp_path, results, tmp_path / "base")
    assert "Level 0 has the numbers of base, to the last digit." in text and cells(text, "acc ↑") == [["acc ↑", *["0.6 ± 0.012"] * 3]]
    save_level(tmp_path / "base", 0, **{**same, "piqa": {"acc": 0.6000001}})
    text = page(tmp_path, results, tmp_path / "base")
    assert "to the last digit" not in text and len(cells(text, "acc ↑")) == 2


def test_published_numbers_stand_alone_and_only_on_request(results, tmp_path):
    text = page(tmp_path, results)
    assert "Published" not in text and "arXiv" not in text
    text = page(tmp_path, results, published=True)
    begin, end = text.index("## Published"), text.index("## How it was measured")
    assert "nothing of it measured here" in text[begin:end] and "arXiv 2506.09316" in text[begin:end]
    for model, values in paper.ROWS.items():
        assert cells(text[begin:end], model)[0][1 : 1 + len(values)] == list(values)
        assert model not in text[:begin] + text[end:]
        assert len(values) <= len(paper.COLUMNS)
    assert not any(re.match(r"\| mine", line) for line in text[begin:end].splitlines())


def test_html_is_one_file(results, tmp_path):
    text = page(tmp_path, results, name="page.html", title="a <b>")
    assert text.startswith("<!doctype html>") and "<title>a &lt;b&gt;</title>" in text and "<b>" not in text
    assert len(figures(text, tmp_path)) == 1 and text.count("<table>") == text.count("</table>") == 4
    assert [path.name for path in tmp_path.iterdir()] == ["mine", "page.html"]
    assert not re.search(r"(src|href)=\"(?!data:)", text)
    assert "<td>0.6 ± 0.012</td>" in text


def test_metrics_are_chosen(results, tmp_path):
    text = page(tmp_path, results, metrics=["needle accuracy@5*", "piqa"])
    assert cells(text, "accuracy@512 ↑") and cells(text, "acc ↑") and not cells(text, "accuracy@1024 ↑") and "loss@512" not in text


def test_many_metrics_and_the_subjects_of_mmlu(tmp_path):
    rows = [{"level": level} | {f"metric_{i}": i for i in range(20)} for level in (0, 1)]
    assert "Drawn are 12 of 20 metrics" in page(tmp_path, save_rows(tmp_path / "many.json", rows))
    save_level(tmp_path / "mmlu", 0, mmlu={"acc": 0.3}, mmlu_law={"acc": 0.2})
    assert "mmlu_law" not in page(tmp_path, tmp_path / "mmlu")
    assert "mmlu_law" in page(tmp_path, tmp_path / "mmlu", metrics=["mmlu*"])


def test_a_deep_model_has_a_row_per_level_and_few_ticks(tmp_path, drawn):
    for level in range(37):
        save_level(tmp_path / "deep", level, piqa={f"m{i}": 10.0**i * (1 + level) for i in range(9)})
    text = page(tmp_path, tmp_path / "deep")
    assert cells(text, "level") == [["level", *(f"m{i}" for i in range(8))], ["level", "m8"]]
    assert cells(text, "0, original")[0][1:3] == ["1", "10"] and cells(text, "36")[0][1:4] == ["37", "370", "3700"]
    assert len(re.findall(r"^\| \d+", text, re.MULTILINE)) == 2 * 37
    (figure,) = drawn
    for axes in figure.axes[:9]:
        shown = labels(axes.xaxis)
        assert shown == ["0", "4", "8", "12", "16", "20", "24", "28", "32", "36"]
        assert all(re.fullmatch(r"[−-]?[\d,]+(\.\d+)?", label) for label in labels(axes.yaxis)), labels(axes.yaxis)


def test_what_was_measured_at_one_level_is_no_panel(results, tmp_path, drawn):
    save_level(results, 2, piqa={"acc": 0.6}, once={"ppl": 3.0})
    text = page(tmp_path, results, metrics=["acc", "ppl"])
    assert cells(text, "ppl ↓") == [["ppl ↓", "3"]]
    assert [axes.get_title() for axes in drawn[0].axes if axes.axison] == ["piqa: acc ↑"]
    text = page(tmp_path, results, metrics=["ppl"])
    assert cells(text, "ppl ↓") and not figures(text, tmp_path) and len(drawn) == 1


def test_what_the_harness_knows_goes_before_what_names_say(tmp_path, drawn):
    for level in (0, 1):
        save_level(tmp_path / "mine", level, odd={"acc": level, "points": level, "wonder": level})
        file = tmp_path / "mine" / f"level-{level:02d}.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"higher_is_better": {"odd": {"acc": False, "points": True}}}))
    text = page(tmp_path, tmp_path / "mine")
    assert cells(text, "acc ↓") and cells(text, "points ↑") and cells(text, "wonder")
    assert [axes.get_title() for axes in drawn[0].axes] == ["odd: acc ↓", "odd: points ↑", "odd: wonder"]


@pytest.mark.parametrize(
    "metric, better",
    [
        ("perplexity@512[64-127]", False),
        ("kl", False),
        ("accuracy@1024", True),
        ("tokens_per_second batch 8", True),
        ("decode_tokens_per_second@4096", True),
        ("seconds_per_token@512", False),
        ("ms@4096", False),
        ("peak_bytes", False),
        ("novels", None),
    ],
)
def test_directions_of_our_own_metrics(metric, better, tmp_path):
    save_level(tmp_path, 1, task={metric: 1.0})
    assert read_measurements(str(tmp_path))[0][0].higher_is_better is better


def test_pictures_lie_beside_a_markdown_page_and_are_named_after_it(results, tmp_path):
    speed = save_rows(tmp_path / "fast.json", [{"level": level, "ms": 9 - level} for level in (0, 2, 4)])
    text = page(tmp_path, results, speed=[speed], name="my page.md")
    assert "](my%20page-quality.png)" in text and "](my%20page-speed.png)" in text and "base64" not in text
    assert len(figures(text, tmp_path)) == 2 and not list(tmp_path.glob("*.tmp"))


# --- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more, words",
    [
        (["--out", "{tmp}/page.pdf"], ["page.pdf must end in .md or .html"]),
        (["{tmp}/none"], ["no such file or folder", "none"]),
        (["{tmp}/empty"], ["holds no level-*.json"]),
        (["{tmp}/text.json"], ["is no JSON"]),
        (["{tmp}/other.json"], ["holds no results"]),
        (["{tmp}/rows.json"], ["rows.json, row 2: no whole number as `level`, but None"]),
        (["{tmp}/mine"], ["of 'mine' is given twice", "NAME="]),
        (["--metrics", "zzz"], ["nothing to show", "['zzz'] match nothing"]),
    ],
    ids=str,
)
def test_refused(more, words, results, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.json").write_text("{")
    (tmp_path / "other.json").write_text('{"level": 3}')
    save_rows(tmp_path / "rows.json", [{"level": 1, "a": 1}, {"a": 1}])
    arguments = ["report", str(results), "--out", str(tmp_path / "page.md"), *(item.format(tmp=tmp_path) for item in more)]
    if not more[0].startswith("--"):
        arguments = ["report", str(results), more[0].format(tmp=tmp_path), "--out", str(tmp_path / "page.md")]
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("dsla report: ") and error.count("\n") == 1
    assert all(word in error for word in words), error
    assert not list(tmp_path.glob("page.*"))


def test_without_matplotlib(results, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert main(["report", str(results), "--out", str(tmp_path / "page.md")]) == 1
    assert "pip install 'dsla-hf[plot]'" in capsys.readouterr().err
