"""Every schedule, default discretization and sampler gives the numbers recorded in tests/golden."""

from __future__ import annotations

import json

import pytest

from helpers import golden_numbers as golden
from mezzotint.core.registry import Spec
from mezzotint.process import samplers, schedules
from mezzotint.sampling.sample import default_discretization

SCHEDULES = json.loads((golden.GOLDEN / "schedules.json").read_text())
SAMPLERS = json.loads((golden.GOLDEN / "samplers.json").read_text())


def test_every_registered_entry_is_recorded():
    assert set(SCHEDULES["schedules"]) == set(SCHEDULES["discretizations"])
    assert set(SCHEDULES["schedules"]) == set(schedules.registry)
    assert set(SAMPLERS) == set(samplers.registry)


@pytest.mark.parametrize("name", schedules.registry)
def test_schedules(name):
    recorded = SCHEDULES["schedules"][name]
    assert golden.schedule_numbers(name) == pytest.approx(recorded, rel=1e-11, abs=1e-11)


@pytest.mark.parametrize("sampler", samplers.registry)
@pytest.mark.parametrize("name", schedules.registry)
def test_default_discretizations(name, sampler):
    """Heun's, JiT's and the consistency sampler have their own; all others share one."""
    if sampler == "consistency":
        spec = default_discretization(golden.make_schedule(name), name, Spec(sampler))
        assert spec == Spec("consistency")
        return
    if sampler == "flow_heun":
        assert golden.discretization_numbers(name, sampler)["name"] == "flow"
        return
    recorded = SCHEDULES["discretizations"][name]["heun" if sampler == "heun" else "ddim"]
    numbers = golden.discretization_numbers(name, sampler)
    for end in ("first", "last_finite"):
        assert numbers.pop(end) == pytest.approx(recorded[end], rel=1e-11)
    assert numbers == {key: recorded[key] for key in numbers}


@pytest.mark.parametrize("name", samplers.registry)
def test_samplers(name):
    for numbers, recorded in zip(golden.sampler_numbers(name), SAMPLERS[name], strict=True):
        assert numbers["options"] == recorded["options"]
        assert numbers["x"] == pytest.approx(recorded["x"], rel=1e-9, abs=1e-9)
