"""The benchmark of layers converted in part runs on a CPU at small shapes, and its rows have what they are read for."""

import json

import pytest
import torch
from scripts import loaded_script


@pytest.fixture
def benchmark():
    with loaded_script("benchmarks/heads.py") as module:
        yield module


def test_rows_of_both_kinds_and_of_what_lies_between(benchmark, tmp_path, capsys):
    benchmark.main(["--tiny", "--device", "cpu", "--results", str(tmp_path)])
    written = json.loads((tmp_path / "heads-layer.json").read_text())
    assert {"command", "versions", "device", "rows"} <= written.keys()
    for shape, kept in (("7B", [4, 2, 1, 0]), ("8B", [2, 1, 0])):
        for what, batch in (("prefill", 1), ("decode", 1), ("decode", 2)):
            rows = [row for row in written["rows"] if (row["shape"], row["what"], row["batch"]) == (shape, what, batch)]
            assert [row["kept"] for row in rows] == kept and rows[0]["to_mean"] == rows[-1]["to_mean"] == 1
            assert all(row["ms"] > 0 and row["to_dearer"] > 0 for row in rows)


def test_the_page_has_a_line_for_each_size(benchmark, tmp_path):
    rows = [
        {"shape": "8B", "what": "decode", "batch": 1, "tokens": 9, "kv_heads": 8, "kept": kept, "branches": branches}
        | {"ms": ms, "to_mean": mean, "to_dearer": dearer}
        for kept, branches, ms, mean, dearer in ((8, 1, 2.0, 1, 1), (4, 1, 3.0, 2, 1.5), (4, 2, 1.8, 1.2, 0.9), (0, 1, 1.0, 1, 1))
    ]
    (tmp_path / "heads-layer.json").write_text(json.dumps({"device": "a card", "rows": rows}))
    page = tmp_path / "page.md"
    page.write_text("<!-- heads -->\n<!-- end -->\n")
    benchmark.main(["--page", str(page), "--results", str(tmp_path)])
    assert "| 8B | decode | 1 | 9 | 2 | 1 | 4 of 8 | 1.20 | 0.90 |" in page.read_text()


@torch.inference_mode()
def test_a_layer_in_part_is_that_of_its_heads(benchmark):
    """A prompt whose kept and converted heads are computed apart."""
    shape = benchmark.Shape(32, 4, 2, 8)
    layer = benchmark.Layer(shape, 1, torch.device("cpu"), torch.float32)
    hidden = layer.random(1, 40, 32)
    q, k, v = layer.projected(hidden)
    kept, converted = int(layer.kept), int(layer.converted)
    softmax = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q[:, :, :2], *(x[:, :, [kept, kept]] for x in (k, v)))), is_causal=True
    )
    dsla = layer.core(q[:, :, 2:], k[:, :, [converted]], v[:, :, [converted]])[0]
    expected = torch.cat([softmax.transpose(1, 2), dsla], 2).flatten(2) @ layer.output.T
    torch.testing.assert_close(layer.prefill(hidden), expected)


@pytest.mark.parametrize("given", [["--what", "training"], ["--shapes", "70B"], ["--device", "cpu"]])
def test_what_it_does_not_take_is_refused(benchmark, given, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(given)
    assert ("takes" if given[0] != "--device" else "--tiny") in capsys.readouterr().err
