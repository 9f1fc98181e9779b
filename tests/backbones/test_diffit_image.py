"""Image-space DiffiT: its equations written out, its preconditioning, its windows and sizes."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from mezzotint.backbones.diffit_image import Cell, DiffiTImage, DiffiTImageConfig
from mezzotint.models import create_model, get_schedule
from mezzotint.process.denoiser import Cond
from mezzotint.process.logsnr import alpha, sigma

TINY = DiffiTImageConfig(
    size=16, num_classes=3, width=16, multipliers=(1, 2), blocks=2, window=4, heads=2, time_width=24
)


def randomised(module, seed=0):
    """Every parameter drawn at random, in float64, so that nothing is trivially zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            std = 0.3 if p.ndim < 2 else p[0].numel() ** -0.5
            p.copy_(torch.randn(p.shape, generator=generator) * std)
    return module.double()


def naive_cell(cell, x, c, q_t, v_t, k_t):
    """Compute eq. 3-10 per window and head, with the temporal key that our code leaves out."""
    block, w = cell.block, cell.window
    normed = cell.norm(x)
    if cell.film is not None:  # ADM (arXiv 2105.05233, section 3.1), about 1
        scale, shift = cell.film.linear(c).split(x.shape[1], dim=1)
        normed = shift[:, :, None, None] + normed * (scale[:, :, None, None] + 1)
    x_hat = cell.conv(F.silu(normed))
    width, heads = x_hat.shape[1], block.attn.heads
    d = width // heads
    out = torch.empty_like(x_hat)
    for b in range(len(x)):
        for top in range(0, x.shape[2], w):
            for left in range(0, x.shape[3], w):
                tokens = x_hat[b, :, top : top + w, left : left + w].flatten(1).T
                normed = F.layer_norm(tokens, (width,), eps=1e-6)
                q, k, v = (block.attn.qkv(normed) + torch.cat([q_t[b], k_t[b], v_t[b]])).split(
                    width, dim=1
                )
                mixed = []
                for head in range(heads):
                    part = slice(head * d, (head + 1) * d)
                    scores = q[:, part] @ k[:, part].T / d**0.5
                    for i in range(w * w):
                        for j in range(w * w):
                            row = (i // w - j // w + w - 1) * (2 * w - 1) + i % w - j % w + w - 1
                            scores[i, j] += block.attn.bias_table[row, head]
                    mixed.append(scores.softmax(1) @ v[:, part])
                h = tokens + block.attn.proj(torch.cat(mixed, dim=1))
                y = h + block.fc2(
                    F.gelu(block.fc1(F.layer_norm(h, (width,), eps=1e-6)), approximate="tanh")
                )
                out[b, :, top : top + w, left : left + w] = y.T.reshape(width, w, w)
    return out + cell.skip(x)


@pytest.mark.parametrize("film", [False, True])
@pytest.mark.parametrize(("inputs", "outputs"), [(16, 16), (24, 16)])
def test_cell_is_the_papers_equations(inputs, outputs, film):
    config = DiffiTImageConfig(
        size=8, width=16, window=2, heads=2, multipliers=(1,), time_width=12, film=film
    )
    cell = randomised(Cell(inputs, outputs, config))
    index = torch.tensor(
        [4, 3, 1, 0, 5, 4, 2, 1, 7, 6, 4, 3, 8, 7, 5, 4]
    )  # of a 2x2 window, by hand
    shapes = (inputs, 4, 6), (12,), (outputs,), (outputs,), (outputs,)
    x, c, q_t, v_t, k_t = (torch.randn(2, *s).double() for s in shapes)
    with torch.no_grad():
        expected = naive_cell(cell, x, c, q_t, v_t, 10 * k_t)
        assert_close(cell(x, c, q_t, v_t, index), expected, rtol=0, atol=1e-12)
        last = cell(x.contiguous(memory_format=torch.channels_last), c, q_t, v_t, index)
        assert_close(last, expected, rtol=0, atol=1e-12)


def test_windows_of_a_cell_are_coupled_by_the_convolution_alone():
    cell = randomised(Cell(16, 16, TINY))
    terms = torch.zeros(1, 16).double()
    index = torch.zeros(256, dtype=torch.long)
    x = torch.randn(1, 16, 8, 8).double()
    other = x.clone()
    other[..., 6:] += 1
    with torch.no_grad():
        cell.norm = torch.nn.Identity()  # group statistics do see the whole image
        one, two = (cell(images, terms, terms, terms, index) for images in (x, other))
        difference = (one - two).abs().amax((0, 1))
    assert not difference[:, :4].any()  # the 3x3 kernel reaches column 5, in the right window
    assert difference[:, 4:].all()


def test_preconditioning_is_edms():
    model = randomised(create_model("diffit-tiny", num_classes=0))
    d = model.info.config.data_std
    logsnr = torch.tensor([-9.0, -1.0, 0.5, 8.0], dtype=torch.float64)
    s = torch.exp(-logsnr / 2)
    x, eps = torch.randn(2, 4, 3, 32, 32, dtype=torch.float64)
    s_image = s.view(-1, 1, 1, 1)
    y = x + s_image * eps
    # EDM eq. 7 and table 1
    c_skip, c_out = d**2 / (s_image**2 + d**2), s_image * d / (s_image**2 + d**2).sqrt()
    c_in, c_noise = 1 / (s_image**2 + d**2).sqrt(), s.log() / 4
    with torch.no_grad():
        expected = c_skip * y + c_out * model.backbone(c_in * y, c_noise, Cond())[0]
        level = logsnr.view(-1, 1, 1, 1)
        guess = model(alpha(level) * x + sigma(level) * eps, logsnr, Cond())
    assert_close(guess.x, expected, rtol=1e-9, atol=1e-9)


def test_schedule_is_edms_lognormal():
    logsnr = get_schedule(create_model("diffit-tiny"))(
        torch.linspace(0.0005, 0.9995, 1000, dtype=torch.float64)
    )
    log_s = -logsnr / 2
    assert log_s.mean().item() == pytest.approx(-1.2, abs=1e-3)
    assert log_s.std().item() == pytest.approx(1.2, rel=1e-2)


@pytest.mark.parametrize("film", [False, True])
def test_starts_at_zero_and_every_parameter_learns_after_one_step(film):
    torch.manual_seed(0)
    net = DiffiTImage(replace(TINY, film=film))
    z, noise, cond = (
        torch.randn(2, 3, 16, 16),
        torch.tensor([-1.0, 0.5]),
        Cond(label=torch.tensor([0, 3])),
    )
    assert not net(z, noise, cond)[0].any()
    randomised(net)
    net(z.double(), noise.double(), cond)[0].square().sum().backward()
    assert all(
        p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in net.parameters()
    )


@pytest.mark.parametrize("film", [False, True])
def test_equal_and_mixed_levels_agree(film):
    net = randomised(DiffiTImage(replace(TINY, film=film)))
    z, noise, label = (
        torch.randn(3, 3, 16, 16).double(),
        torch.tensor([-1.0, 0.5, 2.0]),
        torch.tensor([0, 1, 3]),
    )
    with torch.no_grad():
        together = net(z, noise, Cond(label=label))[0]
        for i in range(3):
            alone = net(z[i : i + 1], noise[i : i + 1], Cond(label=label[i : i + 1]))[0]
            assert_close(alone, together[i : i + 1], rtol=0, atol=1e-12)
        unlabelled = net(z, noise, Cond())[0]
    assert_close(unlabelled[2], together[2], rtol=0, atol=1e-12)  # no label is the null label
    assert not torch.allclose(unlabelled[0], together[0])


@pytest.mark.parametrize("film", [False, True])
def test_checkpointing_changes_nothing(film):
    net = randomised(DiffiTImage(replace(TINY, film=film)))
    z, noise = torch.randn(2, 3, 16, 24).double(), torch.tensor([-1.0, 0.5])
    gradients = []
    for net.checkpointing in ("none", "selective", "full"):
        net.zero_grad()
        net(z, noise, Cond())[0].square().sum().backward()
        gradients.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
    assert_close(gradients[0], gradients[1], rtol=0, atol=0)
    assert_close(gradients[0], gradients[2], rtol=0, atol=0)


def test_dropout_acts_in_training_alone():
    net = randomised(create_model("diffit-tiny", dropout=0.5).backbone)
    args = torch.randn(1, 3, 32, 32).double(), torch.zeros(1), Cond()
    with torch.no_grad():
        assert not torch.equal(net(*args)[0], net(*args)[0])
        net.eval()
        assert torch.equal(net(*args)[0], net(*args)[0])


@pytest.mark.parametrize("multipliers", [(1,), (2, 2, 2), (3, 1)])
def test_any_channel_multipliers(multipliers):
    net = DiffiTImage(
        DiffiTImageConfig(size=16, width=20, multipliers=multipliers, blocks=1, window=4, heads=5)
    )
    assert net(torch.randn(1, 3, 16, 32), torch.zeros(1), Cond())[0].shape == (1, 3, 16, 32)


@pytest.mark.parametrize("shape", [(40, 32), (32, 8)])
def test_size_that_does_not_fit_names_valid_ones(shape):
    with pytest.raises(ValueError, match="multiples of 16; nearest: "):
        create_model("diffit-tiny", size=16)(torch.zeros(1, 3, *shape), torch.zeros(1), Cond())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"size": 24}, "multiples of 16; nearest: 16x16"),
        ({"heads": 3}, "heads 3"),
        ({"multipliers": ()}, "multipliers"),
        ({"dropout": 1.0}, "dropout 1.0"),
        ({"window": 0}, "window 0"),
    ],
)
def test_config_that_does_not_fit(changes, words):
    with pytest.raises(ValueError, match=words):
        create_model("diffit-tiny", **changes)


def test_label_for_an_unconditional_network_is_an_error():
    net = create_model("diffit-tiny", num_classes=0).backbone
    with pytest.raises(ValueError, match="unconditional"):
        net(torch.zeros(1, 3, 32, 32), torch.zeros(1), Cond(label=torch.tensor([1])))


def test_resampling_starts_as_mean_and_nearest_neighbour():
    network = DiffiTImage(replace(TINY, size=32, multipliers=(1, 2, 2)))
    for i, width in enumerate((16, 32)):
        x = torch.randn(2, width, 8, 12)
        assert_close(network.downs[i](x), F.avg_pool2d(x, 2))
    for up in network.ups:
        x = torch.randn(2, 32, 8, 12)
        assert_close(up(x), x)
