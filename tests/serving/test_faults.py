"""What surrounds a server goes wrong: connections that ask for nothing, the slowest clients, huge bodies, full disks, killed processes. An
ordinary request is answered beside all of it."""

import errno
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import openai
import pytest
import uvicorn
from server import byte_tokenizer, running_server

from dsla_hf.serving.engine.engine import Engine, EngineOptions
from dsla_hf.serving.http import connections, guards
from dsla_hf.serving.http.api import ApiOptions, build_app
from dsla_hf.serving.output import lossy_output

GOOD = {"model": "tiny", "prompt": "Hello", "max_tokens": 3, "temperature": 0}
LONG = {**GOOD, "max_tokens": 400, "stream": True, "ignore_eos": True}
FIRST_REQUEST = 3.0  # seconds that the server here gives a connection


@pytest.fixture
def server(tiny_model, adapter_model):
    """The engine, the server and its address."""
    engine = Engine(adapter_model(tiny_model("llama")), 2, EngineOptions(slots=4, block_size=8, max_tokens=512))
    app = build_app(engine, byte_tokenizer(), ApiOptions("tiny", max_new_tokens=400))
    with running_server(uvicorn.Server, app, http=connections.limited_protocol(10_000, FIRST_REQUEST)) as (running, address):
        yield engine, running, address
        wait_for(lambda: not engine.busy)
        assert engine.memory.pool.free_blocks == engine.memory.pool.num_blocks, "something leaked"


def wait_for(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it does not come about"
        time.sleep(0.02)


def connect(address, receive_bytes=None):
    host, port = address.removeprefix("http://").split(":")
    connection = socket.socket()
    if receive_bytes is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    connection.settimeout(10)
    connection.connect((host, int(port)))
    return connection


def as_sent(body):
    body = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def check_answers_soon(address):
    """An ordinary request, from a client of its own, within a second; of three, for others use this machine too."""
    times = []
    for _ in range(3):
        start = time.monotonic()
        answer = httpx.post(f"{address}/v1/completions", json=GOOD, timeout=30)
        times.append(time.monotonic() - start)
        assert answer.status_code == 200
    assert min(times) < 1, times


# --- connections --------------------------------------------------------------------------------------------------


@pytest.fixture
def idle_connections():
    """How many this process may have both ends of, 2,000 if its limit of open files can be raised that far."""
    resource = pytest.importorskip("resource")
    before, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 4500 if hard == resource.RLIM_INFINITY else min(hard, 4500)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(before, most), hard))
    yield min(2000, (most - 300) // 2)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before, hard))


def test_two_thousand_idle_connections_hold_up_nobody(server, idle_connections):
    _, running, address = server
    assert idle_connections >= 300
    silent = []
    try:
        for _ in range(idle_connections):
            silent.append(connect(address))
        check_answers_soon(address)
        wait_for(lambda: len(running.server_state.connections) <= 1, FIRST_REQUEST + 20)
        assert all(connection.recv(1) == b"" for connection in silent), "each was closed"
    finally:
        for connection in silent:
            connection.close()
    check_answers_soon(address)


def test_writers_of_a_byte_a_second_are_closed(server, monkeypatch):
    """In the head of a request by the time of a first request, in its body by that of a body."""
    _, running, address = server
    monkeypatch.setattr(guards, "BODY_SECONDS", 2.0)
    whole, ends = as_sent(LONG), []

    def write(start):
        with connect(address) as connection:
            connection.sendall(whole[:start])
            begin = time.monotonic()
            try:
                for byte in whole[start:]:
                    connection.sendall(bytes([byte]))
                    connection.settimeout(1.0)
                    try:
                        ends.append((start, connection.recv(100), time.monotonic() - begin))
                        return
                    except TimeoutError:
                        continue
            except ConnectionError:
                ends.append((start, b"", time.monotonic() - begin))

    head = whole.index(b"\r\n\r\n") + 4
    writers = [threading.Thread(target=write, args=[start], daemon=True) for start in (5, head + 3) * 5]
    for writer in writers:
        writer.start()
    check_answers_soon(address)
    for writer in writers:
        writer.join(20)
    assert len(ends) == 10 and all(seconds < 10 for _, _, seconds in ends)
    assert all(answer.startswith(b"HTTP/1.1 408") if start > head else answer == b"" for start, answer, _ in ends), ends
    wait_for(lambda: len(running.server_state.connections) == 0)


def test_readers_of_a_byte_a_second_keep_no_place(server):
    """More of them than there are slots: their texts end in the engine, whoever reads them."""
    engine, _, address = server
    readers = [connect(address, 2048) for _ in range(8)]
    try:
        for reader in readers:
            reader.sendall(as_sent(LONG))
        for reader in readers:
            assert reader.recv(1) == b"H"
        check_answers_soon(address)
        time.sleep(1)
        for reader in readers:
            assert reader.recv(1) == b"T"
        wait_for(lambda: not engine.busy)
        assert engine.finished["length"] >= 8 and engine.finished["cancelled"] == 0
        check_answers_soon(address)
    finally:
        for reader in readers:
            reader.close()


# --- bodies ---------------------------------------------------------------------------------------------------------


def resident_mib():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_six_bodies_of_four_mebibytes_hold_up_nobody(server):
    _, _, address = server
    body = json.dumps({**GOOD, "prompt": "a b " * (2**20 - 50)}).encode()
    assert 2**22 - 200 < len(body) <= 2**22
    answers, before = [], resident_mib()

    def send():
        answers.append(httpx.post(f"{address}/v1/completions", content=body, headers={"Content-Type": "application/json"}, timeout=60))

    senders = [threading.Thread(target=send) for _ in range(6)]
    for sender in senders:
        sender.start()
    check_answers_soon(address)
    for sender in senders:
        sender.join(60)
    assert [answer.status_code for answer in answers] == [400] * 6
    assert {answer.json()["error"]["code"] for answer in answers} == {"context_length_exceeded"}
    wait_for(lambda: resident_mib() < before + 100)


def test_a_list_of_millions_of_which_the_last_is_wrong_holds_up_nobody(server):
    _, _, address = server
    sent = '{"model": "tiny", "prompt": [' + "1," * (2**21 - 100) + '"a"]}'
    answers, headers = [], {"Content-Type": "application/json"}
    sender = threading.Thread(
        target=lambda: answers.append(httpx.post(f"{address}/v1/completions", content=sent, headers=headers, timeout=100))
    )
    sender.start()
    check_answers_soon(address)
    sender.join(100)
    assert answers[0].status_code == 400 and answers[0].json()["error"]["param"] == "prompt"


# --- processes ------------------------------------------------------------------------------------------------------


def started(saved, port, output):
    """`dsla serve` in a process of its own, once it answers; output: a file for what it prints and logs."""
    command = [sys.executable, "-c", "from dsla_cli import main; raise SystemExit(main())", "serve", saved[0], "--adapter", saved[1]]
    command += ["--policy", "50%", "--port", str(port), "--name", "tiny"]
    with open(output, "wb") as file:
        process = subprocess.Popen(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, stdout=file, stderr=file)
    deadline = time.monotonic() + 120
    while True:
        try:
            assert httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
            return process
        except httpx.TransportError:
            if time.monotonic() > deadline or process.poll() is not None:
                process.kill()
                pytest.fail(f"the server does not start: {process.poll()}")
            time.sleep(0.1)


@pytest.fixture
def port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_output_that_cannot_be_written_is_lost_until_it_can(monkeypatch):
    class Disk(io.StringIO):
        full = True

        def write(self, text):
            if self.full:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(text)

        def flush(self):
            self.write("")

    disk = Disk()
    monkeypatch.setattr(sys, "stdout", disk)
    with lossy_output():
        print("lost", flush=True)
        disk.full = False
        print("kept", flush=True)
    assert "kept" in disk.getvalue()
    assert sys.stdout is disk and "lost" not in disk.getvalue()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_for_logs_stops_nothing(saved, port):
    process = started(saved, port, "/dev/full")
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(3):
            assert httpx.post(f"{address}/v1/completions", json=GOOD).status_code == 200
        assert httpx.post(f"{address}/v1/completions", content=b"{", headers={"Content-Type": "application/json"}).status_code == 400
        assert httpx.get(f"{address}/health").status_code == 200
        process.send_signal(signal.SIGTERM)
        process.wait(30)
    finally:
        process.kill()


def test_a_killed_server_is_seen_and_starts_again_on_its_port(saved, port, tmp_path):
    """By `kill -9`: a client in mid-stream gets an error at once, a supervisor the signal, and the port is free."""
    process = started(saved, port, tmp_path / "log")
    address = f"http://127.0.0.1:{port}"
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    try:
        stream = client.completions.create(**GOOD | {"max_tokens": 200}, stream=True, extra_body={"ignore_eos": True})
        next(iter(stream))
        process.kill()
        start = time.monotonic()
        with pytest.raises((openai.APIConnectionError, httpx.TransportError)):
            for _ in stream:
                pass
        assert time.monotonic() - start < 5 and process.wait(10) == -signal.SIGKILL
        with pytest.raises(openai.APIConnectionError):
            client.completions.create(**GOOD)
        process = started(saved, port, tmp_path / "log")
        assert client.completions.create(**GOOD).choices[0].finish_reason == "length"
    finally:
        process.kill()
        process.wait(10)
