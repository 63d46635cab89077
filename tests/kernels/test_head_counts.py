"""Another number of heads, as every level and every draw in training has it, compiles nothing anew, for an H100 on any machine."""

import subprocess
import sys
from pathlib import Path

import pytest
import triton

SUPPORT = Path(__file__).parents[1] / "support"
SCRIPT = """
import sys
sys.path.insert(0, {support!r})
import compile_only, torch
from dsla_hf.core.attention import DualStateAttention
from dsla_kernels import softmax_decode

def run(heads, window_size, states):
    layer = DualStateAttention(2 * heads, heads, 64, window_size=window_size, states=states)
    q, k, v = (torch.randn(2, 300, n * heads, 64, dtype=torch.bfloat16, requires_grad=True) for n in (2, 1, 1))
    layer(q, k, v)[0].float().square().mean().backward()
    of_all = [torch.randn(2, 300, heads + 2, 64, dtype=torch.bfloat16) for _ in range(2)]
    kv_heads = torch.arange(heads, dtype=torch.int32)
    with torch.no_grad():
        for keys, values, numbers in ((k, v, None), (*of_all, kv_heads)):
            state = layer(q, keys, values, output_state=True, kv_heads=numbers)[1]
            layer(q[:, :1], keys[:, :1], values[:, :1], state=state, output_state=True, kv_heads=numbers)
        layer.fold(*of_all, kv_heads=kv_heads)
        cache = torch.randn(2, heads, 64, 64, dtype=torch.bfloat16)
        softmax_decode(q[:, :1], cache, cache, torch.full((2,), 33))

run(3, {window}, {states})
first = compile_only.compiled.total()
for heads in (4, 5, 16):
    run(heads, {window}, {states})
print(len(compile_only.compiled), first, compile_only.compiled.total() - first)
"""


@pytest.mark.skipif(not triton.backends.backends.get("nvidia"), reason="this Triton compiles nothing for NVIDIA GPUs")
@pytest.mark.parametrize("window, states, least", [(0, True, 9), (128, True, 9), (128, False, 4)])
def test_other_numbers_of_heads_compile_nothing(window, states, least):
    script = SCRIPT.format(support=str(SUPPORT), window=window, states=states)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    kernels, first, later = map(int, done.stdout.split())
    assert kernels >= least and first >= kernels
    assert later == 0
