"""CUDA graphs of a denoiser, emulated without a GPU."""

import pytest
import torch

import mezzotint as mz
from mezzotint.process import guidance
from mezzotint.process.denoiser import Cond
from mezzotint.process.samplers import registry as samplers
from mezzotint.sampling.cuda_graphs import CudaGraphDenoiser
from mezzotint.sampling.denoisers import FIRST_CALLS, model_denoiser
from mezzotint.sampling.sample import make_logsnr_steps, run_sampler
from mezzotint.sampling.settings import SamplingSettings


def emulated(function):
    """Emulate a recorded graph: replays read the same inputs and write the same outputs."""
    outputs = function()

    def replay():
        for kept, fresh in zip(outputs, function(), strict=True):
            if kept is not None:
                kept.copy_(fresh)

    return replay, outputs


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = mz.create_model("uvit-tiny", size=16).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model


def test_graphs_return_new_tensors_equal_to_the_model(model):
    graphed = CudaGraphDenoiser(model, recorder=emulated)
    results, expected = [], []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        z, logsnr = (
            torch.randn(2, 3, 16, 16, generator=generator),
            torch.randn(2, generator=generator).double(),
        )
        cond = Cond(label=torch.tensor([seed, 9 - seed]))
        results.append(graphed(z, logsnr, cond))
        with torch.no_grad():
            expected.append(model(z, logsnr, cond))
    assert len(graphed.recordings) == 1
    # Compared at the end: a later replay must not change earlier results.
    for a, b in zip(results, expected, strict=True):
        assert torch.equal(a.x, b.x)
        assert torch.equal(a.eps, b.eps)
        assert a.var is None


def test_guidance_interval_records_two_graphs(model):
    grid = torch.linspace(-4, 4, 7, dtype=torch.float64)
    scale = guidance.interval(guidance.dit_s(1.5), -2.0, 2.0)
    z, cond = torch.randn(2, 3, 16, 16), Cond(label=torch.tensor([1, 2]))
    graphed = CudaGraphDenoiser(model, recorder=emulated)
    runs = []
    for denoise in (graphed, model):
        with torch.no_grad():
            guided = guidance.classifier_free(denoise, guidance.null_label(10), scale)
            runs.append(samplers["ddim"](guided, z, grid, cond))
    assert torch.equal(*runs)
    assert len(graphed.recordings) == 2


def test_graphs_need_a_gpu(model):
    with pytest.raises(ValueError, match="CUDA device"):
        CudaGraphDenoiser(model)(torch.randn(1, 3, 16, 16), torch.zeros(1), Cond())


def test_a_sampler_on_graphs_gives_the_same_images(model):
    settings = SamplingSettings(steps=4, cuda_graphs=True, exact=False)
    denoise = model_denoiser(model, settings, emulated)
    z, steps = torch.randn(2, 3, 16, 16), make_logsnr_steps(model, settings)
    cond = Cond(label=torch.tensor([1, 2]))
    made = run_sampler(denoise, z, steps, [0, 1], cond, settings)
    assert torch.equal(made, run_sampler(model, z, steps, [0, 1], cond, settings))
    assert len(denoise.recordings) == 1


@pytest.mark.parametrize(
    ("exact", "recorder", "message"),
    [(None, None, "CUDA device"), (True, emulated, "exact=True")],
)
def test_settings_with_graphs_need_a_gpu_and_no_tiles(exact, recorder, message, model):
    settings = SamplingSettings(cuda_graphs=True, exact=exact)
    with pytest.raises(ValueError, match=message):
        model_denoiser(model, settings, recorder)


def called(model, denoise, sizes):
    """Call with batches of these sizes, and check each answer."""
    for size in sizes:
        z, cond = torch.randn(size, 3, 16, 16), Cond(label=torch.zeros(size, dtype=torch.long))
        with torch.no_grad():
            expected = model(z, torch.zeros(size), cond)
        assert torch.equal(denoise(z, torch.zeros(size), cond).x, expected.x)


def test_by_default_full_batches_and_single_images_are_recorded_after_some_calls(model):
    settings = SamplingSettings(batch=4, exact=False)
    denoise = model_denoiser(model, settings, emulated)
    called(model, denoise, [4] * FIRST_CALLS)
    assert not denoise.recordings  # a short run records nothing
    called(model, denoise, [4])
    assert len(denoise.recordings) == 1
    called(model, denoise, [3] * (FIRST_CALLS + 1))  # a last batch that is not full
    assert len(denoise.recordings) == 1
    called(model, denoise, [size for size in (8, 1, 2) for _ in range(FIRST_CALLS + 1)])
    assert len(denoise.recordings) == 4


@pytest.mark.parametrize("fields", [{"cuda_graphs": False, "exact": False}, {}])
def test_no_graphs_where_they_are_off_or_the_cpu_evaluates_in_tiles(fields, model):
    settings = SamplingSettings(**fields)
    assert not isinstance(model_denoiser(model, settings, emulated), CudaGraphDenoiser)
    assert not isinstance(model_denoiser(model, settings), CudaGraphDenoiser)


def test_by_default_a_failed_recording_costs_one_line(model, capsys):
    attempts = []

    def broken(function):
        attempts.append(1)
        raise RuntimeError("CUDA error: capture\nwith details")

    denoise = model_denoiser(model, SamplingSettings(batch=2, exact=False), broken)
    called(model, denoise, [2, 1] * (FIRST_CALLS + 2))
    assert attempts == [1]
    out = capsys.readouterr().out
    assert out == "sampling goes on without CUDA graphs, which failed: CUDA error: capture\n"
    asked = model_denoiser(model, SamplingSettings(cuda_graphs=True, exact=False), broken)
    with pytest.raises(RuntimeError, match="capture"):
        called(model, asked, [2])
