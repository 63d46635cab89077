"""Ray Serve: two replicas on one machine, an engine each, behind one address."""

import importlib.util
import os
import signal
import socket
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

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
# A replica that does not say in a tenth of a second how busy it is is passed over.
os.environ.setdefault("RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S", "20")
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


def replicas_here():
    """Ids of the replicas' processes, which descend from this one."""
    parents, named = {}, []
    for folder in Path("/proc").iterdir():
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if b"ServeReplica:default:dsla" in (folder / "cmdline").read_bytes():
                named.append(int(folder.name))
        except (ValueError, OSError):  # no process, or one that has ended
            continue

    def descends(process):
        while process in parents and process != os.getpid():
            process = parents[process]
        return process == os.getpid()

    return {process for process in named if descends(process)}


@contextmanager
def two_replicas(saved, **more):
    """Where they are reached, a function that asks them, and the text that comes."""
    base, adapter, model = saved
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ids = byte_tokenizer()("Hello, layer", return_tensors="pt")["input_ids"]
    model.set_level(2)
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    expected = byte_tokenizer().decode(out[0, ids.shape[1] :], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    ray.init(num_cpus=2, include_dashboard=False, configure_logging=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(build({"model": base, "adapter": adapter, "policy": "50%", "slots": "4", "replicas": "2", "cpus": "0.5", **more}))
        address = f"http://127.0.0.1:{port}"
        body = {"model": "my-base", "prompt": "Hello, layer", "max_tokens": 12, "temperature": 0}

        def ask(number):
            with httpx.Client(timeout=60) as client:  # a connection of its own, as other clients have
                return client.post(f"{address}/v1/completions", json={**body, "stream": number % 2 == 1})

        yield address, ask, expected
    finally:
        serve.shutdown()
        ray.shutdown()


@pytest.mark.filterwarnings("ignore")  # Ray's own
@pytest.mark.slow
def test_two_replicas_on_one_machine(saved):
    with two_replicas(saved) as (address, ask, expected):
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(ask, range(24)))
        assert all(answer.status_code == 200 for answer in answers)
        assert {answer.json()["choices"][0]["text"] for answer in answers[::2]} == {expected}
        assert all(answer.text.endswith("data: [DONE]\n\n") for answer in answers[1::2])
        status = [httpx.get(f"{address}/status").json() for _ in range(20)]
        deployment = serve.status().applications["default"].deployments["dsla"]
        assert sum(deployment.replica_states.values()) == 2
        assert max(now["generated_tokens"] for now in status) < 24 * 12, "both replicas served"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_a_session_stays_with_its_replica(saved):
    """What the first request of a session has read, later ones find. Requests without a session are spread, and find it at times."""
    with two_replicas(saved, routing="session") as (address, _, _):

        def found(session, text):
            """Tokens of the prompt that were not read again."""
            body = {"model": "my-base", "prompt": text, "max_tokens": 2, "temperature": 0, "level": 2}
            headers = {} if session is None else {"x-session-id": session}
            with httpx.Client(timeout=60) as client:  # a connection of its own
                answer = client.post(f"{address}/v1/completions", json=body, headers=headers)
            assert answer.status_code == 200, answer.text
            return answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]

        texts = {f"chat {number}": f"{number} " + "what was said before, " * 20 for number in range(12)}
        assert [found(session, text) for session, text in texts.items()] == [0] * 12
        for turn in range(3):
            again = [found(session, text + f"turn {turn}") for session, text in texts.items()]
            assert min(again) > 200, again
        # Without the header they are spread: about half of them come to the replica that has not read them.
        spread = [found(None, text + f"again {turn}") for turn in range(2) for text in texts.values()]
        assert 0 < sum(tokens == 0 for tokens in spread) < len(spread)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_a_killed_replica_is_replaced(saved):
    """By `kill -9`: meanwhile requests are answered by the other one, or told of it; then there are two again."""
    with two_replicas(saved) as (_, ask, expected):
        before = replicas_here()
        assert len(before) == 2
        os.kill(min(before), signal.SIGKILL)
        statuses, deadline = [], time.monotonic() + 150
        while len(replicas_here() - {min(before)}) < 2 or serve.status().applications["default"].status != "RUNNING":
            answer = ask(0)
            statuses.append(answer.status_code)
            assert answer.status_code == 200 or answer.status_code >= 500, "whole, or an error that says so"
            assert answer.status_code != 200 or answer.json()["choices"][0]["text"] == expected
            assert time.monotonic() < deadline, "there is no other replica"
            time.sleep(0.2)
        assert [ask(0).status_code for _ in range(6)] == [200] * 6 and statuses.count(200) > len(statuses) / 2


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


def test_wrong_arguments(monkeypatch):
    with pytest.raises(ValueError, match="no arguments"):
        build({"model": "m", "level": 3})
    with pytest.raises(ValueError, match="model="):
        build({})
    with pytest.raises(ValueError, match="routing must be one of load, session, got 'luck'"):
        build({"model": "m", "routing": "luck"})
    monkeypatch.setitem(ray_app.ROUTERS, "session", "ray.serve.of_another_release.Router")
    with pytest.raises(ValueError, match=r"needs a Ray that has ray\.serve\.of_another_release\.Router"):
        build({"model": "m", "routing": "session"})
