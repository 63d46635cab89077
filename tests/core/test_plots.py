"""Ticks: plain numbers, at measured values, few."""

import re

import pytest

from dsla_hf.core.plots import mark_measured, mark_plain, plain, thinned

pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'dsla-hf[plot]'")


@pytest.mark.parametrize(
    "value, text",
    [(0, "0"), (2048, "2,048"), (131072.0, "131,072"), (1e-5, "0.00001"), (0.1 + 0.2, "0.3"), (-2.5, "-2.5"), (3e8, "300,000,000")],
)
def test_numbers_are_plain(value, text):
    assert plain(value) == text


@pytest.mark.parametrize("depth", [1, 2, 9, 10, 11, 16, 31, 32, 33, 48, 80, 126])
def test_ticks_of_any_depth(depth):
    shown = thinned(range(depth + 1))
    assert shown[0] == 0 and shown[-1] == depth and len(shown) <= 10 and len(shown) >= min(depth + 1, 5)


def test_ticks_that_would_touch_are_left_out():
    assert thinned([0, 1, 2, 4, 64]) == [0, 64]
    assert thinned([1, 2, 4, 64], log=True) == [1, 2, 4, 64]
    assert thinned([0, 4, 8, 12, 16]) == [0, 4, 8, 12, 16]


@pytest.mark.parametrize("values", [[4.1, 4.2, 4.6], [3.0, 90.0], [0.0004, 7.0, 2e6], [1e-9, 1e9]], ids=str)
def test_logarithmic_axes_have_plain_numbers(values):
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    axes.plot([512, 131072, 4096], values[:3] if len(values) == 3 else [*values, values[-1]])
    axes.set(xscale="log", yscale="log")
    mark_measured(axes.xaxis, [512, 131072, 4096])
    mark_plain(axes.yaxis)
    axes.figure.canvas.draw()
    assert [label.get_text() for label in axes.get_xticklabels()] == ["512", "4,096", "131,072"]
    shown = [label.get_text() for label in axes.get_yticklabels()]
    assert 2 <= len(shown) <= 10 and all(re.fullmatch(r"[\d,]+(\.\d+)?", text) for text in shown), shown
    assert not [label for axis in (axes.xaxis, axes.yaxis) for label in axis.get_minorticklabels() if label.get_text()]
