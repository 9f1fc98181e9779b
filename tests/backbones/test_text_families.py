"""Every family that reads text does so by the same block: SiD2 and JiT besides the U-ViT."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from helpers.tiny_models import READERS, create_tiny
from mezzotint.backbones.text_conditioning import TextConditioning
from mezzotint.models import load_model, save_model
from mezzotint.process.denoiser import Cond


def reader(name):
    """A network off its initial values."""
    torch.manual_seed(0)
    model = create_tiny(name).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def query(model, b=2, t=4):
    c = model.info.config
    g = torch.Generator().manual_seed(0)
    z = torch.randn(b, c.channels, c.size, c.size, generator=g)
    text, mask = torch.randn(b, t, 16, generator=g), torch.arange(t) < torch.tensor([[2], [4]])
    return z, torch.linspace(-3, 3, b), text, mask


@pytest.mark.parametrize("name", READERS)
@torch.no_grad()
def test_tokens_are_read_by_attention_alone_and_padding_is_not(name):
    model = reader(name)
    words = model.backbone.words
    assert isinstance(words, TextConditioning)
    for parameter in words.pooled.parameters():
        parameter.zero_()
    z, logsnr, text, mask = query(model)
    plain = model(z, logsnr, Cond(text=text, text_mask=mask)).x
    rubbish = text.masked_fill(~mask[..., None], torch.nan)
    assert torch.equal(model(z, logsnr, Cond(text=rubbish, text_mask=mask)).x, plain)
    other = text.clone()
    other[:, 1] = other[:, 1].flip(-1)
    changed = model(z, logsnr, Cond(text=other, text_mask=mask)).x
    assert all(not torch.equal(a, b) for a, b in zip(changed, plain, strict=True))
    none = torch.zeros_like(mask)
    torch.testing.assert_close(
        model(z, logsnr, Cond()).x, model(z, logsnr, Cond(text=text, text_mask=none)).x
    )


@pytest.mark.parametrize("name", READERS)
def test_a_saved_reader_says_how_wide_its_text_is(name, tmp_path):
    model = reader(name)
    save_model(model, tmp_path / "model")
    again = load_model(tmp_path / "model").eval()
    z, logsnr, text, mask = query(model)
    with torch.no_grad():
        a, b = (m(z, logsnr, Cond(text=text, text_mask=mask)).x for m in (model, again))
    assert torch.equal(a, b)
    assert "- text_dim: 16" in (tmp_path / "model" / "README.md").read_text()


SHARDED = """
import json, sys, torch, torch.distributed as dist
from helpers.tiny_models import create_tiny
from mezzotint.process.denoiser import Cond
from mezzotint.train.parallel import full_tensor, shard

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
errors = {}
for name in sys.argv[1:]:
    gradients = []
    for sharded in (False, True):
        torch.manual_seed(0)
        model = create_tiny(name)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))
        c = model.info.config
        z, text = torch.randn(2, c.channels, c.size, c.size), torch.randn(2, 4, 16)
        net = model.backbone
        if sharded:
            shard(net, None)
        net(z, torch.tensor([0.3, 0.6]), Cond(text=text))[-1].square().sum().backward()
        gradients.append({k: full_tensor(p.grad) for k, p in net.named_parameters()
                          if p.requires_grad})
    plain, whole = gradients
    largest = max(float(g.abs().max()) for g in plain.values())
    errors[name] = max(float((plain[k] - whole[k]).abs().max()) for k in plain) / largest
print(json.dumps(errors))
dist.destroy_process_group()
"""


def test_a_sharded_reader_has_the_gradients_of_a_whole_one():
    done = subprocess.run(
        [sys.executable, "-c", SHARDED, *READERS], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout.splitlines()[-1])
    assert set(errors) == set(READERS)
    assert all(error < 1e-5 for error in errors.values()), errors
