"""Two parts of a layer beside each other."""

import pytest
import torch

from dsla_hf.core.branches import both


def test_one_after_the_other_on_a_cpu():
    order = []
    assert both(torch.zeros(1), lambda: order.append(1) or "a", lambda: order.append(2) or "b") == ("a", "b")
    assert order == [1, 2]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_captured_branches_read_what_came_before_and_are_read_by_what_follows():
    x = torch.zeros(4096, device="cuda")

    def step():
        y = x
        for number in range(8):  # memory of one round is used again by the next
            first, second = both(y, lambda y=y, n=number: (y + n).sin() + y, lambda y=y: y.cos() * 2)
            y = first + second
        return y

    with torch.no_grad():
        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = step()
        for seed in range(3):
            x.copy_(torch.randn(4096, generator=torch.Generator().manual_seed(seed)))
            graph.replay()
            assert torch.equal(found, step())
    torch.testing.assert_close(step().detach(), found)  # with gradients one after the other
