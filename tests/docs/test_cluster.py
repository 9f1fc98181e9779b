"""The scripts of docs/cluster.md: for SLURM with a stub of srun, for Kubernetes pod by pod."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
import yaml

from helpers.elastic import starts
from helpers.ports import find_port
from helpers.runs import SMALL
from mezzotint import config
from mezzotint.core.object_store import is_address
from mezzotint.recipes import recipe_for

ROOT = Path(__file__).parents[2]
SBATCH = ROOT / "examples" / "slurm-train.sbatch"
KUBERNETES = ROOT / "examples" / "kubernetes-train.yaml"
FIELDS = [*SMALL[1:], "samples.count=0", "batch=12", "log_every_images=12", "save.every_images=120"]

# As srun: a task per node, signals go to every task, the exit status is the highest.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for ((i = 0; i < SLURM_JOB_NUM_NODES; i++)); do
  SLURM_NODEID=$i "$@" & tasks+=($!)
done
trap 'kill -USR1 "${tasks[@]}"' USR1
code=0
for task in "${tasks[@]}"; do
  while wait "$task"; one=$?; kill -0 "$task" 2>/dev/null; do :; done
  ((one > code)) && code=$one
done
exit $code
"""
SCONTROL = """#!/bin/bash
case $1 in
  show) echo 127.0.0.1; echo node1 ;;
  requeue) echo "$2" >> requeued ;;
esac
"""


@pytest.mark.parametrize("path", [SBATCH, KUBERNETES], ids=lambda p: p.name)
def test_the_page_shows_the_file(path):
    page = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
    assert (
        f"```{'bash' if path == SBATCH else 'yaml'}\n{path.read_text(encoding='utf-8')}```" in page
    )


def test_the_job_has_what_kubernetes_requires():
    """Fields, values and types of batch/v1 that a server checks, and the names that must agree."""
    service, job = yaml.safe_load_all(KUBERNETES.read_text(encoding="utf-8"))
    assert (service["apiVersion"], service["kind"]) == ("v1", "Service")
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    name, spec = job["metadata"]["name"], job["spec"]
    assert re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,50}[a-z0-9])?", name)
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}

    assert set(spec) == {
        "completionMode", "completions", "parallelism", "successPolicy", "backoffLimitPerIndex",
        "podFailurePolicy", "template",
    }  # fmt: skip
    assert spec["completionMode"] == "Indexed"
    assert 1 <= spec["parallelism"] <= spec["completions"]
    assert type(spec["backoffLimitPerIndex"]) is int
    assert spec["successPolicy"]["rules"] == [{"succeededIndexes": "0"}]
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert rule["action"] == "Ignore"
    assert rule["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]

    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # required by both policies
    assert pod["subdomain"] == service["metadata"]["name"]
    (container,) = pod["containers"]
    values = {variable["name"]: variable["value"] for variable in container["env"]}
    assert all(type(value) is str for value in values.values())
    (port,) = (p["port"] for p in service["spec"]["ports"])
    assert values["MEETING"] == f"{name}-0.{pod['subdomain']}:{port}"
    assert [p["containerPort"] for p in container["ports"]] == [port]
    assert values["GPUS"] == container["resources"]["limits"]["nvidia.com/gpu"]
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    shell, flag, command = container["command"]
    assert (shell, flag) == ("bash", "-c")
    assert command.startswith("exec torchrun ")  # so that it gets the pod's SIGTERM
    assert f"--nnodes 1:{spec['completions']} " in command
    _, _, training = command.partition("-m mezzotint train ")
    preset, *fields = training.split(" --data ")[0].split()
    recipe = config.override(recipe_for(preset), fields)
    assert is_address(recipe.save.store)  # so that the pods need no common disk
    grace = int(re.findall(r"--shutdown-timeout (\d+)", command)[0])
    assert grace < pod["terminationGracePeriodSeconds"]


@pytest.fixture
def processes():
    """Starts processes, and ends them and all that they have started with the test."""
    with ExitStack() as stack:

        def start(command, folder, **variables):
            environment = {
                **os.environ, **variables, "CUDA_VISIBLE_DEVICES": "",
                "PATH": f"{folder}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}"
                + os.environ["PATH"],
            }  # fmt: skip
            with (folder / "output.log").open("ab") as output:
                process = subprocess.Popen(
                    command, cwd=folder, stdout=output, stderr=output, env=environment
                )
            stack.callback(end, process)
            return process

        yield start


def end(process):
    if process.poll() is None:
        family = [psutil.Process(process.pid)]
        family += family[0].children(recursive=True)
        for member in family:
            try:
                member.kill()
            except psutil.NoSuchProcess:
                continue
    process.wait()


def wait_for_images(run, images):
    log, until = run / "log.jsonl", time.monotonic() + 300
    while not log.exists() or last_logged(log) < images:
        assert time.monotonic() < until, (run.parent / "output.log").read_text()[-5000:]
        time.sleep(0.1)


def last_logged(log):
    lines = log.read_text().splitlines()
    return json.loads(lines[-1])["images"] if lines else 0


def last_saved(run):
    return max(int(p.parent.name) for p in run.glob("checkpoints/[0-9]*/manifest.json"))


def job_id():
    """The number of a job whose port is free."""
    while True:
        number = random.randrange(20000)
        with socket.socket() as free:
            if free.connect_ex(("127.0.0.1", 20000 + number)):
                return str(number)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_slurm_script_saves_at_its_notice_and_goes_on_when_it_is_queued_again(
    processes, tmp_path
):
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    number = job_id()
    job = {"SLURM_JOB_ID": number, "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[0-1]"}

    def submit(images):
        arguments = ["unet-tiny", *FIELDS, images, "--data", "digits", "--out", "run"]
        return processes(["bash", str(SBATCH), *arguments], tmp_path, **job)

    first = submit("images=1000000")
    wait_for_images(tmp_path / "run", 240)
    first.send_signal(signal.SIGUSR1)
    first.wait(100)
    assert (tmp_path / "requeued").read_text().split() == [number]
    saved = last_saved(tmp_path / "run")
    assert saved == last_logged(tmp_path / "run" / "log.jsonl")

    again = submit(f"images={saved + 24}")
    assert again.wait(300) == 0, (tmp_path / "output.log").read_text()[-5000:]
    assert [s["images"] for s in starts(tmp_path / "run")] == [0, saved]
    assert all(sum(s["devices"].values()) == 2 for s in starts(tmp_path / "run"))
    assert (tmp_path / "requeued").read_text().split() == [number]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_pods_go_on_after_the_loss_of_pod_0(processes, tmp_path):
    """It holds the meeting point: all pods end, and meet again when Kubernetes starts them."""
    _, job = yaml.safe_load_all(KUBERNETES.read_text(encoding="utf-8"))
    (container,) = job["spec"]["template"]["spec"]["containers"]
    *shell, command = container["command"]
    values = {v["name"]: v["value"] for v in container["env"]}
    values |= {"GPUS": "1", "MEETING": f"127.0.0.1:{find_port()}"}
    launch, _, _ = command.partition(" dimr-xl-2r-256 ")
    assert launch.endswith("-m mezzotint train")

    def start(index, images):
        arguments = " ".join(f"'{field}'" for field in [*FIELDS, f"images={images}"])
        line = f"{launch} unet-tiny {arguments} --data digits --out run"
        return processes([*shell, line], tmp_path, **values, JOB_COMPLETION_INDEX=str(index))

    pods = [start(index, 1_000_000) for index in (0, 1)]
    wait_for_images(tmp_path / "run", 240)
    end(pods[0])
    assert pods[1].wait(200) != 0
    saved = last_saved(tmp_path / "run")
    pods = [start(index, saved + 240) for index in (1, 0)]
    for pod in pods:
        assert pod.wait(300) == 0, (tmp_path / "output.log").read_text()[-5000:]
    assert starts(tmp_path / "run")[-1]["images"] == saved
