"""simple diffusion's U-ViT against the plain network: outputs, loss and every gradient."""

from dataclasses import replace

import pytest
import torch

from helpers.plain import plain_module
from mezzotint.backbones.uvit import UViT, UViTConfig, parameterisation
from mezzotint.process.denoiser import Cond, Model
from mezzotint.process.objectives import registry

BASE = UViTConfig(
    size=16,
    num_classes=5,
    width=8,
    emb_dim=24,
    multipliers=(1, 2, 4),
    blocks=(2, 1),
    depth=2,
    heads=2,
    dropout=0.0,
)


def pair(config, seed=0):
    """Both networks with the same random weights, none of them zero."""
    plain = plain_module("uvit").PlainUViT(config)
    net = UViT(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p += 0.2 * torch.randn(p.shape, generator=generator)
    plain.load_state_dict(net.state_dict())
    return net, plain


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize(
    "changes", [{}, {"num_classes": 0, "channels": 1}, {"blocks": (1, 3), "heads": 4}]
)
def test_outputs_loss_and_gradients(changes, checkpointing):
    config = replace(BASE, **changes)
    net, plain = pair(config)
    net.checkpointing = checkpointing
    generator = torch.Generator().manual_seed(1)
    x, eps = (torch.randn(4, config.channels, 16, 16, generator=generator) for _ in range(2))
    logsnr = torch.tensor([-12.0, -1.5, 0.4, 9.0])
    label = torch.tensor([0, 4, 5, 2]) if config.num_classes else None
    theirs = plain(x, logsnr, label).detach()
    tolerance = (
        1e-5 * theirs.abs().max().item()
    )  # rounding of values that were summed before they cancelled
    torch.testing.assert_close(
        net(x, logsnr, Cond(label=label))[0], theirs, rtol=1e-4, atol=tolerance
    )
    ours = registry["eps_mse"]()(
        Model(net, parameterisation(config)), x, eps, logsnr, Cond(label=label)
    )
    theirs = plain_module("uvit").loss(plain, x, eps, logsnr, label)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    ours.mean().backward()
    theirs.mean().backward()
    gradients = {name: p.grad for name, p in plain.named_parameters()}
    assert set(gradients) == {name for name, _ in net.named_parameters()}
    for name, p in net.named_parameters():
        scale = gradients[name].abs().max()
        torch.testing.assert_close(
            p.grad, gradients[name], rtol=1e-3, atol=float(1e-4 * scale) + 1e-7
        )


def test_channels_last_is_the_same_network():
    net, plain = pair(BASE)
    z = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    logsnr = torch.tensor([-3.0, 2.0])
    net = net.to(memory_format=torch.channels_last)
    out = net(z.contiguous(memory_format=torch.channels_last), logsnr, Cond())[0]
    expected = plain(z, logsnr, torch.full((2,), 5))
    tolerance = 1e-5 * float(expected.detach().abs().max())
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=tolerance)
