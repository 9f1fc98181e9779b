"""Ports for servers and ranks of the tests."""

from __future__ import annotations

import contextlib
import random
import socket


def find_ports(count: int) -> list[int]:
    """Return free ports of 127.0.0.1 below those that the system hands out itself.

    One of the latter may be taken by any process before the one that is meant for it listens.
    """
    ports: list[int] = []
    # Not the generator that tests seed: those beside this one would draw the same ports.
    for port in random.SystemRandom().sample(range(20_000, 32_000), 1000):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            ports.append(port)
        if len(ports) == count:
            return ports
    raise RuntimeError(f"no {count} free ports in 1,000 tries")


def find_port() -> int:
    """Return one of `find_ports`."""
    return find_ports(1)[0]
