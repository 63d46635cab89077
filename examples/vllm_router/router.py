"""One address for several servers of one model at different levels: a request goes to the first of them that has room.

The servers are named from the lowest level to the highest, each with the requests that it may have at once; the last one takes what no
other has room for, and lets it wait. They must know the model by one name (`--served-model-name`):

vllm serve my-checkpoint --served-model-name my-model --port 8101
vllm serve my-hybrid-50  --served-model-name my-model --port 8102
python examples/vllm_router/router.py http://127.0.0.1:8101=8 http://127.0.0.1:8102=64

A text stays with the server where it began. The header `x-served-by` of an answer says which that was.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

# Headers between two neighbours, and what httpx writes itself.
OF_THE_CONNECTION = {"connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade", "host", "content-length"}


@dataclass
class Server:
    """url: where it is. room: requests that it is given at once. running: those that it has."""

    url: str
    room: int
    running: int = 0


def server_of(text: str) -> Server:
    """The server that `URL=REQUESTS` names.

    Raises:
        argparse.ArgumentTypeError: if it names none.
    """
    url, _, room = text.rpartition("=")
    if not url.startswith(("http://", "https://")) or not room.isdigit() or not int(room):
        raise argparse.ArgumentTypeError(f"a server must be URL=REQUESTS, such as http://127.0.0.1:8101=8, got {text!r}")
    return Server(url.rstrip("/"), int(room))


def next_server(servers: Sequence[Server], tried: Sequence[Server]) -> Server | None:
    """The first server with room, or else the last one, of those that were not tried; None if all were."""
    left = [server for server in servers if server not in tried]
    return next((server for server in left if server.running < server.room), left[-1] if left else None)


class Forwarded(StreamingResponse):
    """A server's answer, byte by byte; when it ends, or nobody listens any more, the server is told and has room again."""

    def __init__(self, server: Server, answer: httpx.Response) -> None:
        headers = {name: value for name, value in answer.headers.items() if name not in OF_THE_CONNECTION}
        super().__init__(answer.aiter_raw(), answer.status_code, {**headers, "x-served-by": server.url})
        self.server, self.answer = server, answer

    async def __call__(self, *args: Any) -> None:
        try:
            await super().__call__(*args)
        finally:
            self.server.running -= 1
            await asyncio.shield(self.answer.aclose())


def make_app(servers: Sequence[Server]) -> FastAPI:
    """The router. A server that does not answer at all, or with 503, is passed over."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        # Only the connection has a limit: a text may take as long as it takes, and many may run at once.
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(timeout=httpx.Timeout(None, connect=5), limits=limits) as app.state.client:
            yield

    app = FastAPI(lifespan=lifespan, openapi_url=None)

    @app.api_route("/{path:path}", methods=["GET", "POST"])
    async def forward(path: str, request: Request) -> Response:
        headers = [(name, value) for name, value in request.headers.items() if name not in OF_THE_CONNECTION]
        body = await request.body()
        tried: list[Server] = []
        problems = []
        while (server := next_server(servers, tried)) is not None:
            tried.append(server)
            asked = app.state.client.build_request(
                request.method, f"{server.url}/{path}", params=request.query_params, headers=headers, content=body
            )
            server.running += 1
            try:
                answer = await app.state.client.send(asked, stream=True)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:  # it has not begun to work
                server.running -= 1
                problems.append(f"{server.url}: {type(error).__name__}")
                continue
            except BaseException:
                server.running -= 1
                raise
            if answer.status_code != 503:
                return Forwarded(server, answer)
            server.running -= 1
            problems.append(f"{server.url}: 503")
            await answer.aclose()
        return refusal(503, f"no server took the request ({', '.join(problems)}): try again")

    @app.exception_handler(httpx.TransportError)
    async def lost(request: Request, error: httpx.TransportError) -> Response:
        return refusal(502, f"a server took the request, and was lost before it answered: {type(error).__name__}")

    return app


def refusal(status: int, message: str) -> Response:
    """An error as servers of this API write them."""
    return JSONResponse({"error": {"message": message, "type": "server_error", "code": status}}, status)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("servers", type=server_of, nargs="+", metavar="URL=REQUESTS", help="from the lowest level to the highest")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    uvicorn.run(make_app(options.servers), host=options.host, port=options.port)


if __name__ == "__main__":
    main()
