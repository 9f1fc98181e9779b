"""The guard around the page: hosts, origins, routes, bodies, headers, the login."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import time
from types import SimpleNamespace
from urllib.parse import urlencode

import pytest

from mezzotint.web import app, guard
from mezzotint.web.guard import Credentials, Guard, read_credentials

OPEN = [
    ("GET", "/"), ("HEAD", "/"), ("GET", "/config"), ("GET", "/assets/index-Dx1.js"),
    ("GET", "/static/img/logo.svg"), ("POST", "/gradio_api/queue/join"), ("GET", "/theme.css"),
    ("GET", "/gradio_api/queue/data"), ("POST", "/gradio_api/call/generate"),
    ("GET", "/gradio_api/call/generate/abc1"), ("POST", "/gradio_api/cancel"),
]  # fmt: skip
CLOSED = [
    ("GET", "/openapi.json"), ("GET", "/gradio_api/openapi.json"), ("GET", "/gradio_api/app_id"),
    ("POST", "/gradio_api/upload"), ("POST", "/gradio_api/process_recording"), ("GET", "/docs"),
    ("GET", "/gradio_api/file=/etc/passwd"), ("GET", "/file/etc/passwd"), ("GET", "/monitoring"),
    ("GET", "/gradio_api/proxy=http://example.com/"), ("POST", "/gradio_api/vibe-edit"),
    ("POST", "/gradio_api/run/generate"), ("POST", "/gradio_api/stream/1"), ("PUT", "/"),
    ("GET", "/static/../../etc/passwd"), ("GET", "/assets/..%2f"), ("DELETE", "/config"),
    ("POST", "/"), ("GET", "/gradio_api/dev/reload"), ("GET", "/svelte/a/../../b"), ("GET", "/x"),
]  # fmt: skip


class Page:
    """A guard around an application that records what reaches it."""

    def __init__(self, credentials: Credentials | None = None, body_bytes: int = 1000):
        self.reached: list[tuple[str, bytes]] = []
        self.guard = Guard(self.app, credentials, body_bytes)

    async def app(self, scope, receive, send):
        message = await receive()
        self.reached.append((scope["path"], message["body"]))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"the page"})

    async def request(self, method="GET", path="/", headers=(), body=b"", pieces=1, host="default"):
        """Return (status, headers, body)."""
        host = "127.0.0.1:7860" if host == "default" else host
        pairs = [(k.lower().encode(), v.encode()) for k, v in dict(headers).items()]
        pairs += [(b"host", host.encode())] if host is not None else []
        scope = {"type": "http", "method": method, "path": path, "headers": pairs,
                 "server": ("127.0.0.1", 7860)}  # fmt: skip
        size = -(-len(body) // pieces) or 1
        parts = [body[i : i + size] for i in range(0, len(body), size)] or [b""]
        sent = []

        async def receive():
            part = parts.pop(0)
            return {"type": "http.request", "body": part, "more_body": bool(parts)}

        async def send(message):
            sent.append(message)

        await self.guard(scope, receive, send)
        return sent[0]["status"], dict(sent[0]["headers"]), sent[1]["body"]

    def get(self, *args, **options):
        return asyncio.run(self.request(*args, **options))


@pytest.mark.parametrize(("method", "path"), OPEN)
def test_routes_of_the_page_are_open(method, path):
    page = Page()
    assert page.get(method, path)[0] == 200
    assert page.reached


@pytest.mark.parametrize(("method", "path"), CLOSED)
def test_every_other_route_is_closed(method, path):
    page = Page()
    assert page.get(method, path)[0] == 404
    assert not page.reached


@pytest.mark.parametrize(
    "host", ["127.0.0.1:7860", "127.0.0.1", "localhost:9", "LOCALHOST", "[::1]:7860"]
)
def test_this_machine_is_served(host):
    assert Page().get(host=host)[0] == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example:7860", "127.0.0.1.evil.example", "localhost.evil.example", "192.168.0.2:7860",
        "", "user@127.0.0.1", "127.0.0.1:x", "127.0.0.1/a", "0.0.0.0", "[::1", None, "127.0.0.2",
    ],
)  # fmt: skip
def test_another_host_is_refused(host):
    page = Page()
    status, _, body = page.get(host=host)
    assert 400 <= status < 500
    assert b"served to 127.0.0.1" in body
    assert not page.reached


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"}, {"Origin": "null"}, {"Origin": "http://localhost:7860"},
        {"Origin": "http://127.0.0.1:7861"}, {"Origin": "file://"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "cors"},
        {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "no-cors"},
    ],
)  # fmt: skip
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_another_pages_request_is_refused(headers, method):
    page = Page()
    assert page.get(method, "/gradio_api/queue/join", headers=headers)[0] == 403
    assert not page.reached


def test_a_link_opens_the_page_and_the_page_asks_itself():
    page = Page()
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert page.get(headers=link)[0] == 200
    assert page.get("GET", "/config", headers=link)[0] == 403
    own = {"Origin": "http://127.0.0.1:7860", "Sec-Fetch-Site": "same-origin"}
    assert page.get("POST", "/gradio_api/queue/join", headers=own)[0] == 200


def test_no_frame_may_show_the_page():
    for status, headers, _ in (Page().get(), Page().get(host="evil.example")):
        assert headers[b"x-frame-options"] == b"DENY", status
        assert headers[b"content-security-policy"] == b"frame-ancestors 'none'"


@pytest.mark.parametrize("pieces", [1, 7])
@pytest.mark.parametrize("declared", [{}, {"Content-Length": "1000"}])
def test_a_body_within_the_limit_arrives_whole(pieces, declared):
    page, body = Page(), bytes(1000)
    assert page.get("POST", "/gradio_api/queue/join", declared, body, pieces)[0] == 200
    assert page.reached == [("/gradio_api/queue/join", body)]


@pytest.mark.parametrize(
    ("headers", "size"),
    [
        ({}, 1001), ({"Content-Length": "1001"}, 0), ({"Content-Length": "9" * 40}, 0),
        ({"Content-Length": "-1"}, 0), ({"Content-Length": "x"}, 0),
        ({"Content-Length": "5"}, 2000),
    ],
)  # fmt: skip
def test_a_longer_body_is_refused(headers, size):
    page = Page()
    assert page.get("POST", "/gradio_api/queue/join", headers, bytes(size), 9)[0] == 413
    assert not page.reached


BOB = Credentials("bob", "a pass:word")


def form(name, password):
    return urlencode({"username": name, "password": password}).encode()


def test_a_stranger_gets_the_login_form_alone():
    page = Page(BOB)
    status, _, body = page.get()
    assert status == 200
    assert b"password" in body
    assert b"the page" not in body
    for method, path in [*OPEN, *CLOSED]:
        if path != "/":
            assert page.get(method, path)[0] == 401, path
    for cookie in ("mezzotint-7860=", "mezzotint-7860=x", "access-token=1; mezzotint-7860", "="):
        assert page.get("GET", "/config", {"Cookie": cookie})[0] == 401
    assert not page.reached


def test_login_and_logout():
    page = Page(BOB)
    status, headers, _ = page.get("POST", "/login", body=form("bob", "a pass:word"))
    assert status == 303
    given = headers[b"set-cookie"].decode()
    assert "HttpOnly" in given
    assert "SameSite=Strict" in given
    cookie = {"Cookie": f"other=1; {given.partition(';')[0]}"}
    assert page.get("GET", "/", cookie)[2] == b"the page"
    assert page.get("GET", "/openapi.json", cookie)[0] == 404
    assert page.get("GET", "/logout", cookie)[0] == 303
    assert page.get("GET", "/config", cookie)[0] == 401


@pytest.mark.parametrize(
    "body",
    [
        form("bob", "wrong"), form("bo", "ba pass:word"), form("", ""), b"", b"username=bob",
        b"\xff", form("bob\0a pass", "word"), b"&" * 500, form("BOB", "a pass:word"), b"{}",
    ],
)  # fmt: skip
def test_a_wrong_password_waits(body, monkeypatch):
    monkeypatch.setattr(guard, "WRONG_PASSWORD_SECONDS", 0.05)
    page, start = Page(BOB), time.monotonic()
    assert page.get("POST", "/login", body=body)[0] == 401
    assert time.monotonic() - start >= 0.05
    assert not page.guard.sessions


def test_wrong_passwords_wait_for_each_other(monkeypatch):
    monkeypatch.setattr(guard, "WRONG_PASSWORD_SECONDS", 0.02)
    page = Page(BOB)

    async def guess():
        tries = (page.request("POST", "/login", body=form("bob", str(i))) for i in range(30))
        return [status for status, _, _ in await asyncio.gather(*tries)]

    start = time.monotonic()
    statuses = asyncio.run(guess())
    assert time.monotonic() - start >= 0.02 * guard.LONGEST_QUEUE
    assert statuses.count(401) == guard.LONGEST_QUEUE
    assert statuses.count(429) == 30 - guard.LONGEST_QUEUE


def test_where_the_password_comes_from(monkeypatch):
    monkeypatch.delenv(guard.PASSWORD_VARIABLE, raising=False)
    assert read_credentials("") is None
    assert read_credentials("bob:a pass:word") == BOB
    monkeypatch.setattr("sys.stdin", None)
    for auth in ("bob", "bob:"):
        with pytest.raises(ValueError, match=f"--auth bob needs .* {guard.PASSWORD_VARIABLE}"):
            read_credentials(auth)
    monkeypatch.setenv(guard.PASSWORD_VARIABLE, "a pass:word")
    assert read_credentials("bob") == BOB


@pytest.mark.parametrize("auth", [":pw", ":", ":pw:x"])
@pytest.mark.parametrize("password", ["", "a pass:word"])
def test_a_name_is_needed_before_a_password(auth, password, monkeypatch):
    monkeypatch.setenv(guard.PASSWORD_VARIABLE, password)
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(ValueError, match="--auth has no name; give NAME, or NAME:PASSWORD"):
        read_credentials(auth)


@pytest.mark.parametrize(
    ("number", "port", "message"),
    [
        (errno.EADDRINUSE, 7861, "port 7861 is in use; give another one with --port"),
        (errno.EADDRINUSE, None, "ports 7860 and 99 more are in use; give another one"),
        (errno.EACCES, 80, "port 80 cannot be opened: Permission denied; .* 1024 or above"),
        (errno.EPERM, 443, "port 443 cannot be opened: Operation not permitted; .* --port"),
        (errno.ENOBUFS, None, "port 7860 cannot be opened: No buffer space available; .* --port"),
    ],
)
def test_a_port_that_cannot_be_opened_is_told_with_its_reason(number, port, message, monkeypatch):
    closed = []

    class Refusing:
        def setsockopt(self, *option):
            pass

        def bind(self, address):
            raise OSError(number, os.strerror(number))

        def close(self):
            closed.append(self)

    fake = SimpleNamespace(**{**vars(socket), "socket": Refusing})
    monkeypatch.setattr(app, "socket", fake)
    with pytest.raises(OSError, match=f"^{message}") as error:
        app.open_socket(port)
    assert ("in use" in str(error.value)) == (number == errno.EADDRINUSE)
    assert len(closed) == (100 if "99 more" in message else 1)
