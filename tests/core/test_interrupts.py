"""An interrupt says what is kept."""

import pytest

from dsla_hf.core.interrupts import on_interrupt


class Terminated(KeyboardInterrupt):
    pass


@pytest.mark.parametrize("kind", [KeyboardInterrupt, Terminated])
def test_an_interrupt_leaves_with_the_words_of_the_innermost_block(kind):
    with pytest.raises(kind, match=r"^inner$"), on_interrupt(lambda: "outer"), on_interrupt(lambda: "inner"):
        raise kind


def test_other_errors_are_not_touched():
    with pytest.raises(ValueError, match="wrong"), on_interrupt(lambda: "kept"):
        raise ValueError("wrong")
