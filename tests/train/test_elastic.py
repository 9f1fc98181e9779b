"""Torchrun agents and ranks that are killed, leave and join: the run goes on by itself."""

from __future__ import annotations

import json
import signal
from contextlib import ExitStack, nullcontext

import pytest
import torch

from helpers.elastic import Agent, open_gate, starts, trained, wait_until, waiting_at
from helpers.launch import run_here
from helpers.ports import find_port
from helpers.runs import SMALL, weights
from mezzotint.core import distributed

ROUND = ["model.dropout=0", "samples.count=0", "log_every_images=30", "ema.power_stds=[]"]

ELASTIC = [
    "--nnodes", "1:3", "--nproc-per-node", "1", "--max-restarts", "9", "--rdzv-id", "x",
    "--rdzv-backend", "c10d",
]  # fmt: skip


@pytest.fixture
def agents():
    """Ends the agents of a test and their ranks."""
    with ExitStack() as stack:
        yield lambda agent: (stack.callback(agent.kill), agent)[1]


def command(run, *overrides):
    fields = [field for field in SMALL if not field.startswith("data.source")]
    return [
        "train", "unet-tiny", *fields, *ROUND, *overrides, "--data", "digits", "--out", str(run)
    ]  # fmt: skip


def logged(run):
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line["images"] for line in lines], torch.tensor([line["loss"] for line in lines])


def assert_as_alone(alone, run, folder, images, batch):
    """The run has the log and the weights of one process, and trained every image once."""
    seen, losses = logged(run)
    assert seen == logged(alone)[0]
    torch.testing.assert_close(losses, logged(alone)[1], rtol=2e-5, atol=1e-6)
    for name, tensor in weights(alone).items():
        torch.testing.assert_close(weights(run)[name], tensor, rtol=1e-3, atol=2e-5, msg=name)
    steps = trained(folder)
    assert steps == {n: list(range(n, n + batch)) for n in range(0, images, batch)}


def test_a_killed_rank_is_started_again_and_shares_may_differ_by_an_image(agents, tmp_path):
    """15 images on 2 ranks are 7 and 8."""
    run, alone = tmp_path / "run", tmp_path / "alone"
    fields = ("batch=15", "images=120", "save.every_images=30", "engine.microbatch=3")
    open_gate(tmp_path, 75)
    launch = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    agent = agents(Agent(tmp_path, launch, command(run, *fields)))
    run_here(*command(alone, *fields))
    wait_until(waiting_at(tmp_path, 75, 60), tmp_path)
    agent.ranks()[1].kill()
    open_gate(tmp_path, 1000)
    assert agent.process.wait(300) == 0, (tmp_path / "agents.log").read_text()[-6000:]
    assert [start["images"] for start in starts(run)] == [0, 60]
    assert_as_alone(alone, run, tmp_path, 120, 15)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_run_goes_on_with_the_nodes_that_there_are(agents, tmp_path):
    """2, then 1, then 3 nodes; then one leaves with notice."""
    run, alone = tmp_path / "run", tmp_path / "alone"
    fields = ("batch=60", "images=1920", "save.every_images=240", "log_every_images=60")
    launch = [*ELASTIC, "--rdzv-endpoint", f"127.0.0.1:{find_port()}"]

    def start(host=0):
        settings = ["--rdzv-conf", f"is_host={host},last_call_timeout=3"]
        return agents(Agent(tmp_path, launch + settings, command(run, *fields)))

    def worlds():
        return [(start["images"], start["devices"]) for start in starts(run)]

    open_gate(tmp_path, 540)
    first, second = start(host=1), start()
    run_here(*command(alone, *fields))
    wait_until(waiting_at(tmp_path, 540, 480), tmp_path)
    assert sum(worlds()[-1][1].values()) == 2

    second.kill()
    open_gate(tmp_path, 1020)
    wait_until(waiting_at(tmp_path, 1020, 960), tmp_path)
    assert worlds()[-1][0] == 480
    assert sum(worlds()[-1][1].values()) == 1

    third, fourth = start(), start()
    wait_until(lambda: sum(worlds()[-1][1].values()) == 3, tmp_path)
    open_gate(tmp_path, 1500)
    wait_until(waiting_at(tmp_path, 1500, 1440), tmp_path)
    assert worlds()[-1][0] == 1080  # the step in which the others joined was finished and saved

    (tmp_path / "gate.signalled").unlink(missing_ok=True)
    fourth.process.send_signal(signal.SIGTERM)
    wait_until(lambda: (tmp_path / "gate.signalled").exists(), tmp_path)
    open_gate(tmp_path, 10_000)
    assert fourth.process.wait(100) == 1
    for agent in (first, third):
        assert agent.process.wait(300) == 0, (tmp_path / "agents.log").read_text()[-6000:]
    assert worlds()[-1][0] == 1560
    assert sum(worlds()[-1][1].values()) == 2
    assert_as_alone(alone, run, tmp_path, 1920, 60)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_another_node_takes_over_rank_0_from_the_store(agents, tmp_path):
    """The nodes share no disk: each has a run folder of its own."""
    store, alone = tmp_path / "run", tmp_path / "alone"
    fields = ("batch=60", "images=480", "save.every_images=120", "log_every_images=60")
    launch = [*ELASTIC, "--rdzv-endpoint", f"127.0.0.1:{find_port()}"]

    def start(node, host):
        arguments = command(tmp_path / node, *fields, f"save.store=file://{store}")
        settings = ["--rdzv-conf", f"is_host={host},last_call_timeout=3"]
        return agents(Agent(tmp_path, launch + settings, arguments))

    open_gate(tmp_path, 300)
    first, second = start("a", host=0), start("b", host=1)  # the lower process number has rank 0
    run_here(*command(alone, *fields))
    wait_until(waiting_at(tmp_path, 300, 240), tmp_path)
    assert (tmp_path / "a" / "log.jsonl").exists()
    assert not (tmp_path / "b" / "log.jsonl").exists()
    first.kill()
    open_gate(tmp_path, 1000)
    assert second.process.wait(300) == 0, (tmp_path / "agents.log").read_text()[-6000:]
    assert [start["images"] for start in starts(store)] == [0, 240]
    assert_as_alone(alone, store, tmp_path, 480, 60)


@pytest.mark.parametrize(("restarts", "refused"), [("1", True), ("0", False)])
def test_restarts_in_one_store_are_refused(monkeypatch, restarts, refused):
    """There, the second start of the ranks finds the addresses of the first."""
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    expected = pytest.raises(ValueError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1")
    with expected if refused else nullcontext():
        distributed.init_distributed()
