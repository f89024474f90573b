"""What a browser may ask of the server. Gradio has addresses for files, uploads, proxies and more; here they end.

A page of another site that is open in the same browser gets nothing either: `Host` and `Origin` are checked.
"""

import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

READABLE = re.compile(
    r"/|/config/?|/theme\.css|/favicon\.ico|/manifest\.json|/robots\.txt|/(?:assets|static|svelte)/[\w./-]+"
    r"|/gradio_api/(?:info|theme\.css|startup-events|queue/data|heartbeat/\w+)"
)
WRITABLE = re.compile(r"/gradio_api/(?:queue/join|cancel|reset/?)")
LOCAL_HOST = re.compile(r"(?:localhost|127\.0\.0\.1|\[::1\])(?::\d+)?")
MOST_BYTES = 2**22  # of a request
HEADERS = {
    "content-security-policy": "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


class TooLong(Exception):
    """A request has more than MOST_BYTES."""


class Guard:
    """An ASGI application around Gradio's. `is_local` says that only this machine may name it in `Host`."""

    def __init__(self, app: Any, is_local: bool):
        self.app, self.is_local = app, is_local

    def refusal(self, scope: Message) -> int | None:
        """The HTTP status for a request that is refused, or None."""
        headers = {name.decode().lower(): value.decode("latin-1") for name, value in scope["headers"]}
        host, origin = headers.get("host", ""), headers.get("origin")
        if self.is_local and not LOCAL_HOST.fullmatch(host):
            return 403
        if origin is not None and origin.partition("://")[2] != host:
            return 403
        allowed = WRITABLE if scope["method"] == "POST" else READABLE if scope["method"] in ("GET", "HEAD") else None
        if allowed is None or not allowed.fullmatch(scope["path"]) or ".." in scope["path"]:
            return 404
        length = headers.get("content-length", "0")
        return 413 if not length.isdigit() or int(length) > MOST_BYTES else None

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        status = self.refusal(scope) if scope["type"] == "http" else 404
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008})
        if status:
            await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"0")]})
            return await send({"type": "http.response.body", "body": b""})
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > MOST_BYTES:
                raise TooLong
            return message

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                added = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", []), *added]}
            await send(message)

        await self.app(scope, counted, with_headers)
        return None
