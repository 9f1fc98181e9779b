"""What reaches the page: requests of this machine's browser, on known routes, of bounded size.

`Guard` is ASGI middleware around Gradio. With a name and a password it answers every request of a
visitor who has not logged in itself, so that nothing of the page is sent before.
"""

from __future__ import annotations

import asyncio
import getpass
import hmac
import os
import re
import secrets
import sys
from dataclasses import dataclass, field
from html import escape
from typing import Any
from urllib.parse import parse_qs, urlsplit

PASSWORD_VARIABLE = "MEZZOTINT_STUDIO_PASSWORD"
HOSTS = ("127.0.0.1", "localhost", "::1")
# What the page and Gradio's clients use; anything else is closed, also what a later Gradio adds.
ROUTES = {
    "GET": re.compile(
        r"/|/config/?|/theme\.css|/favicon\.ico|/manifest\.json|/robots\.txt|/pwa_icon(/\d+)?"
        r"|/(assets|static|svelte)/[\w./@+-]+"
        r"|/gradio_api/(info/?|startup-events|theme\.css|queue/data|heartbeat/\w+)"
        r"|/gradio_api/call/\w+/\w+"
    ),
    "POST": re.compile(r"/gradio_api/(queue/join|cancel|run/predict|call/\w+)"),
}
ROUTES["HEAD"] = ROUTES["GET"]
HEADERS = {
    b"content-security-policy": b"frame-ancestors 'none'",
    b"x-frame-options": b"DENY",
    b"x-content-type-options": b"nosniff",
    # "no-referrer" would make the browser send the login form with Origin: null.
    b"referrer-policy": b"same-origin",
    b"cross-origin-opener-policy": b"same-origin",
    b"cross-origin-resource-policy": b"same-origin",
}
WRONG_PASSWORD_SECONDS = 1.0  # between two answers to wrong passwords, of all visitors
LONGEST_QUEUE = 16  # passwords waiting to be looked at
LOGIN = """<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>mezzotint studio</title>
<style>
:root {{ color-scheme: light dark; font-family: system-ui, sans-serif; }}
form {{ max-width: 18rem; margin: 18vh auto 0; display: grid; gap: .8rem; }}
label {{ display: grid; gap: .25rem; }}
input, button {{ font: inherit; padding: .5rem; }}
</style>
<form method="post" action="/login">
<h1>mezzotint studio</h1>
{message}
<label>username <input name="username" autocomplete="username" required autofocus></label>
<label>password <input name="password" type="password" autocomplete="current-password" required>
</label>
<button>Login</button>
</form></html>"""


class Refused(Exception):
    """A request that gets no page: an HTTP status and a sentence."""

    def __init__(self, status: int, why: str):
        super().__init__(why)
        self.status = status


@dataclass(frozen=True)
class Credentials:
    """The name and the password that visitors must give."""

    name: str
    password: str

    def match(self, name: str, password: str) -> bool:
        """Compare in a time that does not depend on where the first difference is."""
        given, wanted = (
            "\0".join(pair).encode("utf-8", "surrogatepass")
            for pair in ((name, password), (self.name, self.password))
        )
        return hmac.compare_digest(given, wanted)


def read_credentials(auth: str) -> Credentials | None:
    """Return the credentials of `--auth`: "name" or "name:password"; None for an empty one.

    The password of a name alone comes from the environment variable MEZZOTINT_STUDIO_PASSWORD, else
    from a prompt.

    Errors: ValueError for an empty name or password, and without a terminal to ask at.
    """
    if not auth:
        return None
    name, _, password = auth.partition(":")
    if not password:
        password = os.environ.get(PASSWORD_VARIABLE, "")
    if not password and name and sys.stdin is not None and sys.stdin.isatty():
        password = getpass.getpass(f"password of {name}: ")
    if not name:
        raise ValueError("--auth has no name; give NAME, or NAME:PASSWORD")
    if not password:
        raise ValueError(
            f"--auth {name} needs a password: set {PASSWORD_VARIABLE}, or run it on a "
            "terminal, which asks for it"
        )
    return Credentials(name, password)


@dataclass
class Guard:
    """ASGI middleware around `app`.

    credentials: None lets everyone in. body_bytes: the largest body of a request.
    """

    app: Any
    credentials: Credentials | None
    body_bytes: int
    sessions: set[str] = field(default_factory=set)
    passwords: asyncio.Lock = field(default_factory=asyncio.Lock)
    waiting: int = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer the request, or pass it on with its body read."""
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":  # no websocket is used
            return await send({"type": "websocket.close", "code": 1008})

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                kept = [pair for pair in message.get("headers", ()) if pair[0] not in HEADERS]
                message = {**message, "headers": [*kept, *HEADERS.items()]}
            await send(message)

        try:
            headers = check_origin(scope)
            body = await self.read_body(headers, receive)
            if self.credentials is not None and await self.log_in(
                self.credentials, scope, headers, body, send_with_headers
            ):
                return
            check_route(scope)
        except Refused as refusal:
            return await answer(send_with_headers, refusal.status, f"{refusal}\n")

        unread = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Any:
            return unread.pop() if unread else await receive()

        await self.app(scope, replay, send_with_headers)

    async def read_body(self, headers: dict[str, str], receive: Any) -> bytes:
        """Return the whole body; Refused where it is longer than `body_bytes`."""
        too_long = Refused(413, f"a request may have {self.body_bytes:,} bytes")
        length = headers.get("content-length", "0")
        if not length.isdecimal() or len(length) > 18 or int(length) > self.body_bytes:
            raise too_long
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] != "http.request":
                raise Refused(400, "the request ended before its body")
            body += message.get("body", b"")
            if len(body) > self.body_bytes:
                raise too_long
            if not message.get("more_body"):
                return bytes(body)

    async def log_in(
        self,
        credentials: Credentials,
        scope: Any,
        headers: dict[str, str],
        body: bytes,
        send: Any,
    ) -> bool:
        """Answer what belongs to the login, and every stranger; return whether it did."""
        cookie = f"mezzotint-{(scope.get('server') or (None, 0))[1]}"
        pairs = (part.strip().partition("=") for part in headers.get("cookie", "").split(";"))
        token = next((value for name, _, value in pairs if name == cookie), "")
        method, path = scope["method"], scope["path"]
        if path == "/logout":
            self.sessions.discard(token)
            await redirect(send, f"{cookie}=; Path=/; Max-Age=0")
        elif path == "/login" and method == "POST":
            form = parse_qs(body[:4000].decode("utf-8", "replace"))
            name, password = (form.get(key, [""])[0] for key in ("username", "password"))
            if await self.check_password(credentials, name, password):
                token = secrets.token_urlsafe(32)
                self.sessions.add(token)
                await redirect(send, f"{cookie}={token}; Path=/; HttpOnly; SameSite=Strict")
            else:
                await show_login(send, 401, "Incorrect Credentials")
        elif token in self.sessions:
            return False
        elif path in ("/", "/login") and method in ("GET", "HEAD"):
            await show_login(send, 200, "")
        else:
            raise Refused(401, "log in first")
        return True

    async def check_password(self, credentials: Credentials, name: str, password: str) -> bool:
        """Compare one password at a time, and wait after a wrong one."""
        if self.waiting >= LONGEST_QUEUE:
            raise Refused(429, "too many passwords at once; try again later")
        self.waiting += 1
        try:
            async with self.passwords:
                if credentials.match(name, password):
                    return True
                await asyncio.sleep(WRONG_PASSWORD_SECONDS)
                return False
        finally:
            self.waiting -= 1


def check_origin(scope: Any) -> dict[str, str]:
    """Return the headers; Refused unless the page itself, on this machine, asks.

    A name that a stranger's page has pointed at 127.0.0.1 arrives as Host; another page's request
    arrives with its Origin, or with Sec-Fetch-Site. Opening the page from a link is allowed.
    """
    headers: dict[str, str] = {}
    for key, value in scope["headers"]:
        name = key.decode("latin-1").lower()
        if name in headers and name in ("host", "origin", "content-length"):
            raise Refused(400, f"two headers {name}")
        headers[name] = value.decode("latin-1")
    host = headers.get("host", "").lower()
    if not host or _hostname(f"http://{host}") not in HOSTS:
        raise Refused(
            403, f"this page is served to 127.0.0.1 and localhost only, not to {host[:80]!r}"
        )
    origin = headers.get("origin")
    if origin is not None and origin.lower() not in (f"http://{host}", f"https://{host}"):
        raise Refused(403, f"this page takes no requests from {origin[:80]!r}")
    foreign = headers.get("sec-fetch-site") in ("cross-site", "same-site")
    opened = scope["method"] == "GET" and headers.get("sec-fetch-mode") == "navigate"
    if foreign and not (opened and scope["path"] == "/"):
        raise Refused(403, "this page takes no requests from other pages")
    return headers


def _hostname(url: str) -> str | None:
    """Return the host of an address without path, user and query; None for any other."""
    try:
        parts = urlsplit(url)
        plain = not (parts.path or parts.query or parts.fragment or "@" in parts.netloc)
        _ = parts.port  # raises for what is no port
        return parts.hostname if plain else None
    except ValueError:
        return None


def check_route(scope: Any) -> None:
    """Raise Refused for a method and path that the page does not use."""
    route, path = ROUTES.get(scope["method"]), scope["path"]
    if route is None or not route.fullmatch(path) or ".." in path:
        raise Refused(404, "this page serves no files and no other routes")


async def answer(
    send: Any,
    status: int,
    text: str,
    kind: str = "text/plain",
    headers: tuple[tuple[bytes, bytes], ...] = (),
) -> None:
    """Send a whole answer."""
    body = text.encode("utf-8", "replace")
    common = (
        (b"content-type", f"{kind}; charset=utf-8".encode()),
        (b"content-length", str(len(body)).encode()),
        (b"cache-control", b"no-store"),
        (b"connection", b"close"),
    )
    await send({"type": "http.response.start", "status": status, "headers": [*common, *headers]})
    await send({"type": "http.response.body", "body": body})


async def redirect(send: Any, cookie: str) -> None:
    """Send the visitor to the page with a cookie."""
    headers = ((b"location", b"/"), (b"set-cookie", cookie.encode()))
    await answer(send, 303, "", headers=headers)


async def show_login(send: Any, status: int, message: str) -> None:
    """Send the login form."""
    shown = f'<p role="alert">{escape(message)}</p>' if message else ""
    await answer(send, status, LOGIN.format(message=shown), "text/html")
