"""Ray Serve: two replicas on one machine, an engine each, behind one address."""

import importlib.util
import os
import socket
import warnings
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch
from engine_texts import SMALL
from server import byte_tokenizer

from dsla_hf.serving.engine.engine import Engine

if importlib.util.find_spec("ray") is None:
    pytest.skip("needs the extra 'ray': pip install 'dsla-hf[ray]'", allow_module_level=True)

# A proxy that is not there after five seconds is killed, which is too soon for a busy machine.
os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray 2.60 makes its schemas as older releases of pydantic wanted
    import ray
    from ray import serve

    from dsla_hf.serving import ray_app
    from dsla_hf.serving.ray_app import build


@pytest.fixture
def saved(tmp_path, tiny_model, adapter_model):
    base = tiny_model("llama")
    base.save_pretrained(tmp_path / "my-base")
    byte_tokenizer().save_pretrained(tmp_path / "my-base")
    model = adapter_model(base)
    model.save_pretrained(tmp_path / "my-adapter")
    return str(tmp_path / "my-base"), str(tmp_path / "my-adapter"), model


@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_two_replicas_on_one_machine(saved):
    base, adapter, model = saved
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ray.init(num_cpus=2, include_dashboard=False, configure_logging=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(build({"model": base, "adapter": adapter, "policy": "50%", "slots": "4", "replicas": "2", "cpus": "0.5"}))
        address = f"http://127.0.0.1:{port}"
        body = {"model": "my-base", "prompt": "Hello, layer", "max_tokens": 12, "temperature": 0}

        def ask(number):
            with httpx.Client(timeout=60) as client:  # a connection of its own, as other clients have
                return client.post(f"{address}/v1/completions", json={**body, "stream": number % 2 == 1})

        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(ask, range(24)))
        assert all(answer.status_code == 200 for answer in answers)
        ids = byte_tokenizer()(body["prompt"], return_tensors="pt")["input_ids"]
        model.set_level(2)
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        expected = byte_tokenizer().decode(out[0, ids.shape[1] :], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert {answer.json()["choices"][0]["text"] for answer in answers[::2]} == {expected}
        assert all(answer.text.endswith("data: [DONE]\n\n") for answer in answers[1::2])
        status = [httpx.get(f"{address}/status").json() for _ in range(20)]
        deployment = serve.status().applications["default"].deployments["dsla"]
        assert sum(deployment.replica_states.values()) == 2
        assert max(now["generated_tokens"] for now in status) < 24 * 12, "both replicas served"
    finally:
        serve.shutdown()
        ray.shutdown()


def test_a_replica_is_unhealthy_when_only_a_new_process_helps(tiny_model, monkeypatch):
    engine = Engine(tiny_model("llama"), 0, SMALL)
    monkeypatch.setattr(ray_app, "_engines", [engine])
    for _ in range(3):
        engine.health.failed("decode", RuntimeError("broken"))
    ray_app.Replica().check_health()  # it may recover
    with monkeypatch.context() as patch:
        patch.setattr(engine.watchdog, "seconds", 1e-9)
        with engine.watchdog.step(), pytest.raises(RuntimeError, match="a step of the engine has not ended"):
            ray_app.Replica().check_health()
    engine.health.failed("decode", RuntimeError("CUDA error: misaligned address"))
    with pytest.raises(RuntimeError, match="misaligned address"):
        ray_app.Replica().check_health()


def test_wrong_arguments():
    with pytest.raises(ValueError, match="no arguments"):
        build({"model": "m", "level": 3})
    with pytest.raises(ValueError, match="model="):
        build({})
