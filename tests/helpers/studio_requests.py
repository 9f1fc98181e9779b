"""Requests to a studio over HTTP, without a browser."""

from __future__ import annotations

import json
import urllib.error
import urllib.request

import pytest


def call(server, values: list, name: str = "generate") -> str:
    """Call the HTTP API; return its raw answer."""
    body = json.dumps({"data": values}).encode()
    request = urllib.request.Request(
        f"{server.url}/gradio_api/call/{name}", body, headers={"Content-Type": "application/json"}
    )
    number = json.loads(fetched(request))["event_id"]
    return fetched(f"{server.url}/gradio_api/call/{name}/{number}", 120)


def fetched(request, seconds: float = 30) -> str:
    with urllib.request.urlopen(request, timeout=seconds) as answer:
        return answer.read().decode()


def refused(request) -> tuple[int, str, bytes]:
    """Return status, headers and body of an answer that is an error."""
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(request, timeout=30)
    with error.value as answer:
        return answer.code, str(answer.headers), answer.read()


def values(**changes) -> list:
    """Return the arguments of `generate` in the order of the form."""
    form = {"model": "good", "label": "every class in turn", "prompts": "", "negative": ""}
    form |= {
        "seeds": "0",
        "sampler": "ddim",
        "steps": 2,
        "guidance": 1,
        "curve": "constant",
        "power": 4,
        "limited": False,
    }
    form |= {"low": -3, "high": 5, "size": ""}
    return list({**form, **changes}.values())
