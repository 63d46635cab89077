"""Connections to the server: no more than the process may have, and none kept for a client that asks for nothing.

uvicorn has limits of requests, and of idle connections behind a first request, not of these. What is used of its protocols: the connections
that they share, and `cycle`, which is None until a first request has come whole but for its body.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

logger = logging.getLogger(__name__)

FIRST_REQUEST_SECONDS = 20.0  # in which the head of a connection's first request must have come
SPARE_DESCRIPTORS = 64  # for files, pipes and the listening socket
SAID_EVERY = 60.0  # seconds between two lines of the log about connections that were turned away


def most_connections() -> int:
    """That the process's limit of open files leaves room for."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return 8192
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 8192 if limit == resource.RLIM_INFINITY else max(limit - SPARE_DESCRIPTORS, limit // 2, 1)


def limited_protocol(most: int, seconds: float = FIRST_REQUEST_SECONDS) -> type[asyncio.Protocol]:
    """uvicorn's HTTP protocol for at most `most` connections: those beyond are closed at once, and so is one whose first request does not
    come within `seconds`."""
    base: Any = AutoHTTPProtocol

    class Limited(base):
        said = -SAID_EVERY  # of all connections, when it was last said

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._first_request = self.loop.call_later(seconds, self._give_up)
            if len(self.connections) > most:
                if time.monotonic() - Limited.said >= SAID_EVERY:
                    Limited.said = time.monotonic()
                    logger.warning(
                        "%d connections are open, as many as the limit of open files leaves room for: new ones are closed until some end "
                        "(raise it with `ulimit -n`, or put a proxy in front)",
                        most,
                    )
                transport.abort()

        def connection_lost(self, exc: Exception | None) -> None:
            self._first_request.cancel()
            super().connection_lost(exc)

        def _give_up(self) -> None:
            if self.cycle is None:
                self.transport.close()

    return Limited
