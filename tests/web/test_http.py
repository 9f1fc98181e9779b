"""The studio over HTTP: bad requests, strangers, paths, large bodies."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request

import psutil
import pytest

from helpers.studio_requests import call, fetched, refused, values

REFUSED = [
    {"seeds": "0-99999999"},
    {"seeds": "/etc/passwd"},
    {"steps": 10**6},
    {"steps": "x"},
    {"steps": None},
    {"guidance": 1e9},
    {"size": "4096"},
    {"size": "32x33"},
    {"model": "/etc"},
    {"model": "../good"},
    {"sampler": "__import__"},
    {"label": "9999"},
    {"curve": "constant", "limited": True, "guidance": 2, "low": 9, "high": -9},
    {"prompts": "a red ring"},
    {"model": "text", "prompts": "red " * 1001},
    {"model": "text", "prompts": "red\n" * 17},
    {"model": "text", "guidance": 3},
    {"model": "text", "prompts": "red", "negative": "blue"},
    {"negative": "blue"},
    {"model": "text", "prompts": '{"text": 3}'},
    {"model": "text", "prompts": '{"text": "red", "size": 32}'},
    {"model": "text", "prompts": '{"text": "red", "guidance": 1e9}'},
    {"model": "no-encoder", "prompts": "red"},
    {"model": ["good"]},
    {"model": {"good": 1}},
    {"model": None},
    {"steps": [2]},
    {"steps": True},
    {"steps": "1e999"},
    {"steps": 10**200},
    {"label": ["0"]},
    {"label": {"a": 0}},
    {"label": True},
    {"seeds": ["0"]},
    {"prompts": {"a": "b"}},
    {"guidance": [1]},
    {"size": [16]},
    {"sampler": ["ddim"]},
    {"sampler": 3},
    {"curve": ["constant"], "guidance": 2},
    {"power": "x", "curve": "power-cosine", "guidance": 2},
]


@pytest.mark.parametrize("changes", REFUSED, ids=lambda c: str(c)[:60])
def test_a_bad_request_is_refused_over_http(server, changes):
    answer = call(server, values(**changes))
    assert "event: error" in answer
    # A sentence, no bare failure of a type.
    said = json.loads(answer.rpartition("data: ")[2])["error"]
    assert said
    assert "TypeError" not in said
    assert len(said) < 500
    assert "root:" not in answer
    assert "data:image" not in answer


def test_a_request_over_http(server):
    assert "data:image/png" in call(server, values())


PATHS = [
    "/gradio_api/file=/etc/passwd",
    "/gradio_api/file=../../../../etc/passwd",
    "/gradio_api/file=..%2f..%2f..%2fetc%2fpasswd",
    "/gradio_api/file=file:///etc/passwd",
    "/file=/etc/passwd",
    "/static/../../../../../../etc/passwd",
    "/assets/..%2f..%2f..%2f..%2f..%2fetc%2fpasswd",
    "/gradio_api/proxy=http://example.com/",
    "/gradio_api/upload",
    "/gradio_api/process_recording",
    "/openapi.json",
    "/gradio_api/app_id",
]


def test_only_this_page_on_this_machine_is_answered(server):
    stranger = {"Host": "evil.example:7860", "Origin": "http://evil.example:7860"}
    for headers in (stranger, {"Host": "evil.example"}, {"Origin": "http://evil.example"}):
        for path in ("/", "/config", "/gradio_api/info"):
            status, answered, _ = refused(
                urllib.request.Request(server.url + path, headers=headers)
            )
            assert status == 403
            assert "evil" not in answered


def test_large_bodies_are_refused_unread(server):
    process = psutil.Process(server.process.pid)
    before = process.memory_info().rss
    body = b'{"fn_index": 1, "session_hash": "x", "data": ["' + b"a" * (40 << 20) + b'"]}'
    request = urllib.request.Request(
        f"{server.url}/gradio_api/queue/join", body, headers={"Content-Type": "application/json"}
    )
    # An answer of 413, or the connection closed while sending.
    with pytest.raises(OSError) as error:
        fetched(request)
    if isinstance(error.value, urllib.error.HTTPError):
        assert error.value.code == 413
        error.value.close()
    assert process.memory_info().rss - before < 20 << 20


@pytest.mark.parametrize("path", PATHS)
def test_no_path_is_opened(server, path):
    status, _, body = refused(server.url + path)
    assert 400 <= status < 500
    assert b"root:" not in body


def test_a_photo_is_no_path_or_address(server):
    config = json.loads(fetched(f"{server.url}/config"))
    photo = next(c["id"] for c in config["components"] if c["props"].get("elem_id") == "photo")
    which = next(
        d for d in config["dependencies"] if d["inputs"][:1] == [photo] and len(d["inputs"]) == 3
    )
    for text in (
        "/etc/passwd",
        "file:///etc/passwd",
        {"path": "/etc/passwd"},
        "http://127.0.0.1:1/x.png",
    ):
        body = {"data": [text, 0.5, 64], "fn_index": which["id"], "session_hash": "visitor"}
        request = urllib.request.Request(
            f"{server.url}/gradio_api/queue/join",
            json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        fetched(request)
        answer = fetched(f"{server.url}/gradio_api/queue/data?session_hash=visitor")
        assert "are not opened" in answer
        assert "root:" not in answer


def test_the_server_stays_on_this_machine(server):
    connections = psutil.Process(server.process.pid).net_connections(kind="inet")
    assert connections
    assert {c.laddr.ip for c in connections} == {"127.0.0.1"}
    assert {c.raddr.ip for c in connections if c.raddr} <= {"127.0.0.1"}


@pytest.mark.slow
def test_twenty_visitors_for_a_minute(server):
    from concurrent.futures import ThreadPoolExecutor

    process = psutil.Process(server.process.pid)
    call(server, values())
    before = process.memory_info().rss
    end = time.monotonic() + 60

    def visitor(number: int) -> tuple[int, int]:
        sent = answered = 0
        while sent == 0 or time.monotonic() < end:
            sent += 1
            answered += "data:image/png" in call(
                server, values(seeds=f"{number * 100}-{number * 100 + 7}", steps=10)
            )
        return sent, answered

    with ThreadPoolExecutor(20) as pool:
        counts = list(pool.map(visitor, range(20)))
    assert all(sent == answered for sent, answered in counts), counts
    assert sum(sent for sent, _ in counts) >= 20
    assert process.memory_info().rss - before < 300 << 20
