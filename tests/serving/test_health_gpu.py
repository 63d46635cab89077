"""A real error that stays with the process: the server tells everyone, and its process ends with a code that a supervisor sees."""

import os
import socket
import subprocess
import sys
import time

import httpx
import pytest
import torch

# A process of its own: after a device-side assert nothing on the device works there any more.
SERVE = """
import sys
import torch
from dsla_hf.serving import command
from dsla_hf.serving.engine.graphs import GraphRunner

decode = GraphRunner.decode
calls = [0]

def breaks(self, *args, **kwargs):
    calls[0] += 1
    if calls[0] > 20:
        torch.zeros(1, device="cuda")[torch.tensor([5], device="cuda")]
    return decode(self, *args, **kwargs)

GraphRunner.decode = breaks
model, adapter, port = sys.argv[1:]
command.serve(command.ServeOptions(model, adapter, policy="1"), port=int(port))
"""
BODY = {"model": "my-base", "prompt": [1, 2, 3], "max_tokens": 8, "ignore_eos": True}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_real_device_side_assert_ends_the_process(saved, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = tmp_path / "serve.py"
    script.write_text(SERVE)
    log = tmp_path / "log.txt"
    with open(log, "wb") as file:
        server = subprocess.Popen([sys.executable, str(script), *saved, str(port)], stdout=file, stderr=file, env=dict(os.environ))
    answers = []
    try:
        deadline = time.monotonic() + 180
        while server.poll() is None and time.monotonic() < deadline:
            try:
                answers.append(httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=BODY, timeout=30).status_code)
            except httpx.TransportError:
                time.sleep(0.1)
        assert server.wait(30) == 70, log.read_text()[-3000:]
    finally:
        server.kill()
    assert 200 in answers and any(code >= 500 for code in answers) and set(answers) <= {200, 500, 503}
    assert "the engine has ended, start the server anew" in log.read_text()
