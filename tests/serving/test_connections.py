"""Connections of the server in a process of its own right: how many, and for how long without a request."""

import asyncio
import socket
import time

import httpx
import pytest
import uvicorn
from server import running_server
from starlette.responses import PlainTextResponse

from dsla_hf.serving.http import connections


@pytest.fixture
def address(monkeypatch):
    """Of a server for four connections, whose first requests must come within half a second."""

    async def app(scope, receive, send):
        if scope["type"] == "lifespan":
            while (await receive())["type"] != "lifespan.shutdown":
                await send({"type": "lifespan.startup.complete"})
            await send({"type": "lifespan.shutdown.complete"})
            return
        await asyncio.sleep(float(scope["query_string"] or 0))
        await PlainTextResponse("here")(scope, receive, send)

    with running_server(uvicorn.Server, app, http=connections.limited_protocol(4, 0.5)) as (_, found):
        yield found


def connect(address):
    host, port = address.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=5)


def is_closed(connection, within):
    """Whether the other side closes it in so many seconds."""
    connection.settimeout(within)
    try:
        return connection.recv(1) == b""
    except (TimeoutError, ConnectionResetError) as error:
        return isinstance(error, ConnectionResetError)


def test_connections_without_a_request_are_closed(address):
    silent, slow = connect(address), connect(address)
    slow.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n")
    start = time.monotonic()
    assert is_closed(silent, 3) and is_closed(slow, 3)
    assert 0.2 < time.monotonic() - start < 3


def test_a_request_that_takes_longer_is_answered(address):
    assert httpx.get(f"{address}/?0.8", timeout=5).text == "here"


def test_a_connection_that_has_asked_once_may_wait(address):
    with httpx.Client() as client:
        assert client.get(address).text == "here"
        time.sleep(0.8)
        assert client.get(address).text == "here"


def test_more_connections_are_turned_away_and_told_of_once(address, caplog):
    held = [connect(address) for _ in range(4)]
    time.sleep(0.1)
    refused = [connect(address) for _ in range(3)]
    assert all(is_closed(connection, 0.3) for connection in refused)
    lines = [record.message for record in caplog.records if "connections are open" in record.message]
    assert len(lines) == 1 and lines[0].startswith("4 connections are open")
    for connection in held:
        connection.close()
    time.sleep(0.1)
    assert httpx.get(address).text == "here", "places come back"


def test_the_limit_follows_that_of_open_files():
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        for limit, most in ((1000, 936), (100, 50)):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
            assert connections.most_connections() == most
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
