"""Examples of running the server as a service: they name what there is, and fit the server's own times and options."""

import argparse
import json
import re
import shlex
import socket
from pathlib import Path

import pytest
from prometheus_client import generate_latest

from dsla_cli import main
from dsla_cli.commands import serve
from dsla_hf.inference.recorder import PlainRecording
from dsla_hf.serving.engine.engine import Engine, EngineOptions
from dsla_hf.serving.http.metrics import Metrics

REPOSITORY = Path(__file__).resolve().parents[2]
EXAMPLES = REPOSITORY / "examples" / "serving"
DASHBOARD = json.loads((EXAMPLES / "grafana.json").read_text())
UNIT = dict(line.split("=", 1) for line in (EXAMPLES / "dsla.service").read_text().splitlines() if "=" in line and not line.startswith("#"))
DOCKERFILE = (EXAMPLES / "Dockerfile").read_text()


def parsed(words):
    """The options of `dsla serve`, from the words after it."""
    parser = argparse.ArgumentParser()
    serve.add_to(parser.add_subparsers(), "serve")
    return parser.parse_args(["serve", *words])


@pytest.fixture(scope="module")
def metric_names():
    """What Prometheus finds in /metrics: every name that a query may hold."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 97}
    options = EngineOptions(slots=2, block_size=8, max_tokens=64)
    engine = Engine(LlamaForCausalLM(LlamaConfig(**sizes)).eval(), 0, options, record=PlainRecording)  # as on a GPU
    engine.submit([5, 6], 3, lambda event: None)
    while engine.busy:
        engine.step()
    return set(re.findall(r"^([a-z][\w:]*)[{ ]", generate_latest(Metrics(engine, "m").registry).decode(), re.MULTILINE))


def test_every_metric_of_the_dashboard_is_there(metric_names):
    queries = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    queries += [variable["query"] for variable in DASHBOARD["templating"]["list"]]
    named = set(re.findall(r"\b(?:vllm:|dsla_)\w+", " ".join(queries)))
    assert len(named) > 12 and named <= metric_names, f"/metrics lacks {sorted(named - metric_names)}"


def test_panels_of_the_dashboard_have_their_places():
    taken = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])}
        assert not cells & taken and place["x"] + place["w"] <= 24, panel["title"]
        taken |= cells
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_the_unit_starts_the_server_anew_and_lets_it_drain():
    program, command, *words = shlex.split(UNIT["ExecStart"].replace("%%", "%"))
    assert program.endswith("/dsla") and command == "serve" and "%" not in UNIT["ExecStart"].replace("%%", "")
    assert parsed(words).max_level == "50%"
    assert UNIT["Restart"] == "on-failure" and int(UNIT["TimeoutStopSec"]) > parsed(words).drain_seconds


def test_the_container_has_what_it_copies_and_a_command_that_there_is():
    for line in re.findall(r"^COPY (.+)$", DOCKERFILE, re.MULTILINE):
        *sources, _ = line.split()
        assert all((REPOSITORY / source).exists() for source in sources), line
    entry, words = (json.loads(re.search(rf"^{name} (\[.*\])$", DOCKERFILE, re.MULTILINE)[1]) for name in ("ENTRYPOINT", "CMD"))
    assert entry[:2] == ["dsla", "serve"]
    options = parsed([*entry[2:], *words])
    assert options.host == "0.0.0.0" and f"EXPOSE {options.port}\n" in DOCKERFILE and f":{options.port}/health" in DOCKERFILE
    stop = re.search(r"--stop-timeout (\d+)", DOCKERFILE)
    assert int(stop[1]) > options.drain_seconds


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def test_the_very_arguments_serve(saved, capsys):
    """Those of the unit, and of the container with the command that its head and the docs name, over a model of here."""
    base, adapter = saved
    entry = json.loads(re.search(r"^ENTRYPOINT (\[.*\])$", DOCKERFILE, re.MULTILINE)[1])
    docs = (REPOSITORY / "docs" / "deploy.md").read_text()
    runs = re.findall(r"(?<= dsla )/model --adapter /adapter .*$", DOCKERFILE, re.MULTILINE)
    assert runs == re.findall(r"(?<= dsla )/model --adapter /adapter .*$", docs, re.MULTILINE) and len(runs) == 1
    unit = shlex.split(UNIT["ExecStart"].replace("%%", "%"))
    places = {"/srv/dsla/my-checkpoint": base, "/srv/dsla/my-adapter": adapter, "/model": base, "/adapter": adapter}
    for words in (unit[1:], [*entry[1:], *shlex.split(runs[0])]):
        told = [places.get(word, word) for word in words]
        assert not [word for word in told if word.startswith("/") and not Path(word).exists()]
        assert main([*told, "--dry-run", "--port", free_port()]) in (0, None)
        assert "0 to 2 of 4 layers" in capsys.readouterr().out


def test_the_unit_keeps_caches_where_it_may_write():
    """systemd makes /var/cache/CacheDirectory for its user, who may write nowhere else."""
    cache = f"/var/cache/{UNIT['CacheDirectory']}/"
    assert all(value.split("=")[1].startswith(cache) for value in UNIT["Environment"].split()) and UNIT["ProtectSystem"] == "strict"
    assert {"HF_HOME", "TRITON_CACHE_DIR"} == {value.split("=")[0] for value in UNIT["Environment"].split()}
    assert f"{UNIT['EnvironmentFile'].lstrip('-')} <<<" in (REPOSITORY / "docs" / "deploy.md").read_text()
