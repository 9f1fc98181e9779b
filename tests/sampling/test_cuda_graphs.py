"""CUDA graphs of a denoiser, emulated without a GPU."""

import pytest
import torch

import mezzotint as mz
from mezzotint.process import guidance
from mezzotint.process.denoiser import Cond
from mezzotint.process.samplers import registry as samplers
from mezzotint.sampling.cuda_graphs import CudaGraphDenoiser, record
from mezzotint.sampling.sample import make_logsnr_steps, model_denoiser, run_sampler
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
    [(None, record, "CUDA device"), (True, emulated, "exact=True")],
)
def test_settings_with_graphs_need_a_gpu_and_no_tiles(exact, recorder, message, model):
    settings = SamplingSettings(cuda_graphs=True, exact=exact)
    with pytest.raises(ValueError, match=message):
        model_denoiser(model, settings, recorder)
