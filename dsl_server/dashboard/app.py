"""What the page's address answers: the page, its files, and the run as JSON and as events. It only tells.

Whoever can reach the port may look: there is no password. So by default that is this machine, and then what
is asked for under any other host's name is refused: a page from elsewhere could have its own name lead here
(DNS rebinding) and read along. All that the page loads is here, and the browser is told so.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from common.tls import is_loopback
from dsl_server.dashboard.feed import TICK_S, Feed

STATIC = Path(__file__).parent / "static"
HEADERS = {
    "Content-Security-Policy": "; ".join(
        ["default-src 'self'", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"]
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


def app_of(feed: Feed, only_loopback: bool) -> ASGIApp:
    """only_loopback: answer only what is asked of this machine by a name that is always its own."""

    async def page(_: Request) -> Response:
        return FileResponse(STATIC / "page.html")

    async def view(_: Request) -> Response:
        body = ",".join(f'"{name}":{text}' for name, text in feed.texts().items())
        return Response(f"{{{body}}}\n", media_type="application/json")

    async def metrics(_: Request) -> Response:
        lines = "".join(json.dumps(line) + "\n" for line in feed.lines)
        return Response(lines, media_type="application/jsonl")

    async def events(request: Request) -> Response:
        if request.method == "HEAD":
            return Response(media_type="text/event-stream")
        return StreamingResponse(feed.events(), media_type="text/event-stream")

    @asynccontextmanager
    async def ticking(_: Starlette) -> AsyncIterator[None]:
        ticks = asyncio.create_task(_tick(feed))
        yield
        ticks.cancel()

    routes = [
        Route("/", page),
        Route("/view.json", view),
        Route("/metrics.jsonl", metrics),
        Route("/events", events),
        Mount("/static", StaticFiles(directory=STATIC)),
    ]
    return Door(Starlette(routes=routes, lifespan=ticking), only_loopback)


class Door:
    """Judges what host a request names, and gives every answer the headers above."""

    def __init__(self, app: ASGIApp, only_loopback: bool) -> None:
        self._app, self._only_loopback = app, only_loopback

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def told(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        host = Headers(scope=scope).get("host", "").lower()
        app: ASGIApp = self._app
        if self._only_loopback and not is_loopback(host):
            app = PlainTextResponse(
                f"This page is for this machine: ask for it at http://localhost, not at {host!r}.\n", 421
            )
        await app(scope, receive, told)


async def _tick(feed: Feed) -> None:
    while not feed.ended:
        feed.tick()
        await asyncio.sleep(TICK_S)
