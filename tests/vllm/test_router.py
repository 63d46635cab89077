"""The router of examples/vllm_router, before servers that stand for vLLM's."""

import argparse
import asyncio
import threading
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from scripts import loaded_script
from server import running_server

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "vllm_router" / "router.py"


@pytest.fixture(scope="module")
def router():
    with loaded_script(SCRIPT) as module:
        yield module


class Fake:
    """A server that says what it is asked, and streams until it is told to end."""

    def __init__(self, status=200):
        self.app, self.end, self.streams, self.status = FastAPI(), threading.Event(), 0, status
        self.app.post("/v1/completions")(self.stream)
        self.app.post("/v1/echo")(self.echo)

    async def stream(self):
        async def pieces():
            self.streams += 1
            try:
                yield b"data: first\n\n"
                while not self.end.is_set():
                    await asyncio.sleep(0.01)
                yield b"data: last\n\n"
            finally:
                self.streams -= 1

        return StreamingResponse(pieces(), media_type="text/event-stream")

    async def echo(self, request: Request):
        headers = request.headers
        said = {"body": (await request.body()).decode(), "query": str(request.query_params), "key": headers.get("authorization")}
        return JSONResponse(said, self.status, {"x-own": "kept"})


@contextmanager
def routed(router, *servers):
    """The router before servers, fakes with their room or addresses: yields its address, and the servers as it knows them."""
    with ExitStack() as running:
        known = []
        for server, room in servers:
            if isinstance(server, Fake):
                _, server = running.enter_context(running_server(uvicorn.Server, server.app))
            known.append(router.Server(server, room))
        _, address = running.enter_context(running_server(uvicorn.Server, router.make_app(known)))
        yield address, known


def until(condition):
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "waited for ten seconds"
        time.sleep(0.01)


def test_a_server_is_named_by_its_address_and_room(router):
    assert router.server_of("http://127.0.0.1:8101/=8") == router.Server("http://127.0.0.1:8101", 8)
    for wrong in ("http://127.0.0.1:8101", "127.0.0.1=8", "http://127.0.0.1=0", "http://127.0.0.1=many"):
        with pytest.raises(argparse.ArgumentTypeError, match="URL=REQUESTS"):
            router.server_of(wrong)


def test_requests_fill_the_lowest_level_first_and_wait_at_the_highest(router):
    low, high = Fake(), Fake()
    with routed(router, (low, 2), (high, 1)) as (address, known), httpx.Client() as client, ExitStack() as open_streams:
        answers = [open_streams.enter_context(client.stream("POST", f"{address}/v1/completions")) for _ in range(5)]
        assert [answer.headers["x-served-by"] for answer in answers] == [known[i].url for i in (0, 0, 1, 1, 1)]
        assert [server.running for server in known] == [2, 3]
        low.end.set()
        assert [b"".join(answer.iter_raw()) for answer in answers[:2]] == [b"data: first\n\ndata: last\n\n"] * 2
        until(lambda: known[0].running == 0)
        again = open_streams.enter_context(client.stream("POST", f"{address}/v1/completions"))
        assert again.headers["x-served-by"] == known[0].url, "a request that has ended makes room"
        high.end.set()


def test_a_stream_is_passed_on_as_it_comes_and_ended_where_nobody_listens(router):
    fake = Fake()
    with routed(router, (fake, 1)) as (address, known):
        with httpx.Client() as client, client.stream("POST", f"{address}/v1/completions") as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            pieces = answer.iter_raw()  # kept: without it the stream would end
            assert next(pieces) == b"data: first\n\n", "the server has not ended"
            assert fake.streams == 1 and known[0].running == 1
        until(lambda: fake.streams == 0 and known[0].running == 0)


def test_what_is_asked_and_answered_is_passed_on_whole(router):
    fake = Fake(status=404)
    with routed(router, (fake, 1)) as (address, known):
        said = httpx.post(f"{address}/v1/echo?a=1&b=2", content="body", headers={"authorization": "Bearer key"})
        assert said.status_code == 404 and said.headers["x-own"] == "kept"
        assert said.json() == {"body": "body", "query": "a=1&b=2", "key": "Bearer key"}
        until(lambda: known[0].running == 0)


def test_servers_that_cannot_take_a_request_are_passed_over(router):
    gone, busy, ready = "http://127.0.0.1:9", Fake(status=503), Fake()
    with routed(router, (gone, 4), (busy, 4), (ready, 4)) as (address, known):
        said = httpx.post(f"{address}/v1/echo", content="body")
        assert said.status_code == 200 and said.headers["x-served-by"] == known[2].url
        until(lambda: not any(server.running for server in known))
    with routed(router, (gone, 4), (busy, 4)) as (address, known):
        said = httpx.post(f"{address}/v1/echo", content="body")
        message = said.json()["error"]["message"]
        assert said.status_code == 503 and gone in message and f"{known[1].url}: 503" in message
