"""DDP, FSDP2 and HSDP on gloo ranks: the same losses, and what a step and a save cost each rank."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from helpers import rank_work
from helpers.ranks import run_on_ranks
from mezzotint.config import Engine
from mezzotint.core import distributed
from mezzotint.core.distributed import World
from mezzotint.train import parallel
from mezzotint.train.setup import check_start

DEPTH = 2
NETWORK = (
    "jit-tiny",
    "model.size=16",
    f"model.depth={DEPTH}",
    "model.context_tokens=1",
    "model.context_start=0",
)
FLOAT32, BF16 = "engine.precision=float32", "engine.precision=bf16"
FSDP, COMPILED = "engine.strategy=fsdp", "engine.compile=true"
GROUPS = DEPTH + 1  # of FSDP2: each block, and all else

TWO = {
    "ddp": (FLOAT32,),
    "fsdp": (FLOAT32, FSDP),
    "fsdp, compiled, selective": (FLOAT32, FSDP, COMPILED, "engine.checkpointing=selective"),
    "ddp, bf16": (BF16,),
    "fsdp, bf16, compiled, full": (BF16, FSDP, COMPILED, "engine.checkpointing=full"),
}
FOUR = {
    "ddp": (FLOAT32, "engine.microbatch=1"),
    "hsdp": (FLOAT32, "engine.microbatch=1", FSDP, "engine.shard_ranks=2"),
}


def run(ranks, folder, layouts):
    chosen = {name: (*NETWORK, *overrides) for name, overrides in layouts.items()}
    return run_on_ranks(ranks, rank_work.train_and_save, folder, chosen)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return run(2, tmp_path_factory.mktemp("two"), TWO)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return run(4, tmp_path_factory.mktemp("four"), FOUR)


def curves(found, name):
    """Losses and gradient norms of every rank, which all agree on them."""
    assert all(rank[name]["curve"] == found[0][name]["curve"] for rank in found)
    return torch.tensor(found[0][name]["curve"], dtype=torch.float64)


@pytest.mark.parametrize("layout", ["fsdp", "fsdp, compiled, selective"])
def test_shards_train_like_copies(two, layout):
    torch.testing.assert_close(curves(two, layout), curves(two, "ddp"), rtol=2e-5, atol=0)


def test_shards_in_bf16_compiled_and_checkpointed_train_like_copies_in_bf16(two):
    """Not bit for bit: weights outside autocast's products are rounded when they are gathered."""
    copies, shards = curves(two, "ddp, bf16"), curves(two, "fsdp, bf16, compiled, full")
    torch.testing.assert_close(shards, copies, rtol=1e-2, atol=0)
    # Both are far from each other's start, and bf16 is not float32 by another name.
    assert (copies - curves(two, "ddp")).abs().max() > 1e-6


def test_shards_by_node_train_like_copies(four):
    torch.testing.assert_close(curves(four, "hsdp"), curves(four, "ddp"), rtol=2e-5, atol=0)


def test_collectives_of_a_step(two, four):
    """The last all-reduce agrees on the step; sharded gradients need one more for their norm."""
    shards = {"_allgather_base_": 2 * GROUPS - 1, "_reduce_scatter_base_": GROUPS}
    for rank in two:
        # DDP's buckets: a first small one, and one for the rest.
        assert rank["ddp"]["collectives"] == {"allreduce_": 2 + 1}
        assert rank["fsdp"]["collectives"] == {**shards, "allreduce_": 1 + 1}
        for layout in ("fsdp, compiled, selective", "fsdp, bf16, compiled, full"):
            assert rank[layout]["collectives"] == {**shards, "allreduce_": 1 + 1}
    for rank in four:
        # Two microbatches of one image: reduced within a copy twice, between copies once.
        assert rank["ddp"]["collectives"] == {"allreduce_": 2 + 1}
        assert rank["hsdp"]["collectives"] == {
            "_allgather_base_": 2 * (2 * GROUPS - 1),
            "_reduce_scatter_base_": 2 * GROUPS,
            "allreduce_": GROUPS + 1 + 1,
        }


@pytest.mark.parametrize(("ranks", "layout"), [(2, "ddp"), (2, "fsdp"), (4, "ddp"), (4, "hsdp")])
def test_a_save_copies_each_tensor_once_per_job(ranks, layout, request):
    found = request.getfixturevalue({2: "two", 4: "four"}[ranks])
    state, weights = found[0][layout]["state"], found[0][layout]["weights"]
    copied = [rank[layout]["copied"] for rank in found]
    # Rank 0 also writes model/ and model-raw/, which need the weights whole.
    copied[0] -= 2 * weights
    assert sum(copied) == pytest.approx(state, rel=0.02)
    assert max(copied) == pytest.approx(state / ranks, rel=0.1)


def test_gradients_stay_in_the_buckets_of_ddp_alone(two):
    for rank in two:
        assert rank["ddp"]["gradients stay"]
        assert not rank["fsdp"]["gradients stay"]


def test_no_rank_waits_in_a_step_for_one_that_starts_reads_evaluates_or_writes_late(tmp_path):
    """A collective of a step gives up after two seconds here, and each is later."""
    late = run_on_ranks(2, rank_work.train_with_slow_ranks, tmp_path, 2.6, step_seconds=2.0)
    assert [sorted(what) for what in late] == [["writes"], ["evaluates", "reads", "starts"]]


def test_what_a_rank_sends_at_its_start_does_not_grow_with_the_number_of_ranks(tmp_path):
    two, four = (run_on_ranks(n, rank_work.count_start_traffic, tmp_path / str(n)) for n in (2, 4))
    assert two[0] == four[0]
    assert four[1] == four[2] == four[3] == two[1]
    calls, sizes = zip(*two[0].values(), strict=True)
    assert 20 <= sum(calls) <= 50
    assert sum(sizes) < 10_000
    assert "all_gather_object" not in two[0]


@pytest.mark.parametrize(
    ("engine", "size", "named"),
    [
        (Engine(strategy="fsdp", microbatch=1), 3, "set engine.microbatch=2, or batch=9"),
        (Engine(shard_ranks=2), 4, "shard_ranks=2 and engine.strategy=ddp"),
        (Engine(shard_ranks=2), 1, "shard_ranks=2 and engine.strategy=ddp"),
        (Engine(strategy="fsdp", shard_ranks=3), 4, "does not divide 4 ranks; 2, 4 do"),
    ],
)
def test_ranks_that_cannot_share_the_weights_are_refused(engine, size, named):
    with pytest.raises(ValueError, match=named):
        parallel.check_sharding(engine, size, 8)


def test_a_start_checks_the_sharding(tmp_path):
    recipe = rank_work.recipe("unet-tiny", "engine.shard_ranks=2")
    with pytest.raises(ValueError, match=r"set engine\.strategy=fsdp"):
        check_start(recipe, tmp_path, World(0, 1, torch.device("cpu")))


def test_nccl_knows_its_device_and_gives_up_after_a_stated_time(monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with (
        mock.patch("torch.cuda.is_available", return_value=True),
        mock.patch("torch.cuda.set_device") as chosen,
        mock.patch("torch.distributed.init_process_group") as init,
        mock.patch("torch.distributed.get_rank", return_value=1),
    ):
        world = distributed.init_distributed()
    assert world == World(1, 2, torch.device("cuda", 1))
    chosen.assert_called_once_with(world.device)
    init.assert_called_once_with("nccl", timeout=distributed.STEP_TIMEOUT, device_id=world.device)
