"""Two public trainers as entrants of time_to_quality.py: diffusers' script and lucidrains' Trainer.

Both train without labels. Our DPM-Solver++ 2M samples from their averaged weights, with as many
steps as ours.

lucidrains' package needs torchvision, which the library does not. Install both in a folder PEERS,

    pip install --no-deps --target PEERS denoising-diffusion-pytorch==2.3.4 ema-pytorch==0.8.3 \\
        accelerate==1.15.0 pytorch-fid==0.3.0 einops==0.8.2 torchvision==0.28.0

and add PEERS to PYTHONPATH.
"""

from __future__ import annotations

import itertools
import math
import os
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mezzotint.core import rng
from mezzotint.data.image_dataset import ImageDataset, open_images
from mezzotint.data.transforms import to_model_range, to_uint8
from mezzotint.evaluate.image_source import ImageSource, from_samples
from mezzotint.process.denoiser import Cond, Denoised, Model, Parameterisation
from mezzotint.process.prediction import named
from mezzotint.process.samplers.dpmpp_2m import dpmpp_2m
from mezzotint.process.samplers.grids import even_logsnr
from mezzotint.process.schedules.ddpm import Table, ddpm, linear_ddpm
from time_to_quality import Data, Entrant, Judge

SAMPLE_BATCH = 25


class _Called(nn.Module):
    """A public network with our signature: (z, index, cond) -> [output]."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, z: Tensor, noise: Tensor, cond: Cond) -> list[Tensor]:
        """Return [prediction], of z's shape."""
        out = self.net(z, noise.float())
        return [out if isinstance(out, Tensor) else out.sample]


class _Info:
    """The part of `ModelInfo` that `eps_mse_by_level` reads: the network has no classes."""

    class config:
        num_classes = 0


class Peer(Entrant):
    """A public trainer. row: its prediction, eps or v."""

    row: str

    def __init__(self, data: Data, root: Path):
        self.data, self.folder = data, root / self.name
        self.folder.mkdir(parents=True, exist_ok=True)

    @abstractmethod
    def averaged(self) -> nn.Module:
        """Return the averaged network of the last save."""

    @abstractmethod
    def table(self) -> Table:
        """Return its table of noise levels."""

    def model(self) -> Model:
        """Return the averaged network as a model of ours."""
        parameterisation = Parameterisation(kind=named(self.row), noise=self.table().index)
        return Model(_Called(self.averaged()), parameterisation, info=_Info()).eval()

    def draw(self, model: Model, steps: int, seeds: list[int]) -> Tensor:
        """Sample (b, 3, size, size) uint8 by every entrant's sampler, with x clipped."""
        table = self.table()
        low, high = max(-9.0, float(table.logsnr[-1])), min(9.0, float(table.logsnr[0]))
        grid = even_logsnr(table, steps, logsnr_min=low, logsnr_max=high)

        def clipped(z: Tensor, logsnr: Tensor, cond: Cond) -> Denoised:
            x = model(z, logsnr, cond).x.clamp(-1, 1)
            return Denoised(x, x)  # this sampler reads x alone

        z = rng.normal("latent", 0, seeds, (3, self.data.size, self.data.size))
        with torch.no_grad():
            return to_uint8(dpmpp_2m(clipped, z, grid, Cond()))

    def source(self, judge: Judge, count: int) -> ImageSource:
        """Return `count` samples of seeds 0, 1, ..."""
        model = self.model()
        return from_samples(
            lambda seeds: self.draw(model, judge.steps, list(seeds)),
            count,
            name=self.name,
            metadata={"steps": judge.steps},
            batch=SAMPLE_BATCH,
            channels=3,
        )

    def judge(self, judge: Judge, picture: Path) -> dict[str, Any]:
        """Return the metrics of the averaged weights, parameters and GMAC per image."""
        from torch.utils.flop_counter import FlopCounterMode

        model = self.model()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.zeros(1, 3, self.data.size, self.data.size), torch.zeros(1), Cond())
        return {
            "params": sum(p.numel() for p in model.parameters()),
            "gmac_per_image": counter.get_total_flops() / 2e9,
            **judge.judge(model, self.source(judge, judge.num_samples), picture),
        }


def shuffled_batches(images: ImageDataset, batch: int, seed: int) -> Iterator[Tensor]:
    """Yield float images in [-1, 1] (batch, 3, h, w) without end, reshuffled every epoch."""
    for epoch in itertools.count():
        generator = torch.Generator().manual_seed(seed + epoch)
        order = torch.randperm(len(images), generator=generator).tolist()
        for start in range(0, len(images) - batch + 1, batch):
            yield to_model_range(images.batch(order[start : start + batch])[0])


class Diffusers(Peer):
    """UNet2DModel as train_unconditional.py of diffusers 0.42 builds and trains it by default.

    Batch 16, AdamW of rate 1e-4, betas (0.95, 0.999), decay 1e-6; 500 steps of warm-up, then a
    cosine over 100 epochs; eps by mean squared error over DDPM's linear table; gradients clipped at
    1; --use_ema with inverse gamma 1, power 3/4, at most 0.9999.
    """

    name, row = "diffusers", "eps"
    batch = 16

    def build(self) -> nn.Module:
        """Return the script's network, for images of the data's size."""
        from diffusers import UNet2DModel

        down = ["DownBlock2D"] * 4 + ["AttnDownBlock2D", "DownBlock2D"]
        return UNet2DModel(
            sample_size=self.data.size,
            in_channels=3,
            out_channels=3,
            layers_per_block=2,
            block_out_channels=(128, 128, 256, 256, 512, 512),
            down_block_types=tuple(down),
            up_block_types=tuple(name.replace("Down", "Up") for name in reversed(down)),
        )

    def table(self) -> Table:
        """Return DDPM's linear table."""
        table = linear_ddpm()
        assert isinstance(table, Table)
        return table

    def averaged(self) -> nn.Module:
        """Return the averaged network of the last save."""
        net = self.build()
        net.load_state_dict(torch.load(self.folder / "state.pt", weights_only=True)["average"])
        return net

    def advance(self, images: int) -> None:
        """Train until `images` have been seen, and save."""
        from diffusers import DDPMScheduler
        from diffusers.optimization import get_scheduler
        from diffusers.training_utils import EMAModel

        torch.manual_seed(0)
        dataset = open_images(self.data.train, size=self.data.size, channels=3)
        net = self.build().train()
        average = EMAModel(
            net.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75
        )
        scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
        optimiser = torch.optim.AdamW(
            net.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8
        )
        steps = 100 * math.ceil(len(dataset) / self.batch)
        rate = get_scheduler(
            "cosine", optimizer=optimiser, num_warmup_steps=500, num_training_steps=steps
        )
        seen, path = 0, self.folder / "state.pt"
        if path.exists():
            state = torch.load(path, weights_only=True)
            net.load_state_dict(state["net"])
            optimiser.load_state_dict(state["optimiser"])
            rate.load_state_dict(state["rate"])
            average.shadow_params = state["shadow"]
            average.optimization_step = seen = state["step"]
        torch.manual_seed(1 + seen)
        batches = shuffled_batches(dataset, self.batch, seed=seen)
        while seen * self.batch < images:
            clean = next(batches)
            noise = torch.randn_like(clean)
            t = torch.randint(0, 1000, (len(clean),))
            out = net(scheduler.add_noise(clean, noise, t), t).sample
            nn.functional.mse_loss(out.float(), noise.float()).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimiser.step()
            rate.step()
            optimiser.zero_grad()
            average.step(net.parameters())
            seen += 1
        raw = {k: v.clone() for k, v in net.state_dict().items()}
        average.copy_to(net.parameters())
        state = {
            "net": raw,
            "average": net.state_dict(),
            "shadow": average.shadow_params,
            "optimiser": optimiser.state_dict(),
            "rate": rate.state_dict(),
            "step": seen,
        }
        torch.save(state, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)


def import_lucidrains() -> Any:
    """Import denoising_diffusion_pytorch, also where torchvision lacks its compiled operators.

    torchvision's CUDA build cannot register them on a CPU build of torch. No entrant calls them.
    """
    real = torch.library.register_fake

    def register_fake(op: Any, *args: Any, **options: Any) -> Any:
        if str(op).startswith("torchvision::"):
            return lambda function: function
        return real(op, *args, **options)

    torch.library.register_fake = register_fake
    try:
        import denoising_diffusion_pytorch
    finally:
        torch.library.register_fake = real
    return denoising_diffusion_pytorch


class Lucidrains(Peer):
    """Unet(64, (1, 2, 4, 8)) and Trainer of denoising-diffusion-pytorch as its README says.

    Its Trainer runs unmodified: two batches of 32 per step; Adam with rate 8e-5; average 0.995
    every ten steps; v over its sigmoid table; flips. It runs in float32, because its amp needs a
    GPU, and without its own FID and samples. The clock leaves out its decoding processes.
    """

    name, row = "lucidrains", "v"
    batch = 64

    def trainer(self) -> Any:
        """Return its Trainer with the last save loaded."""
        package = import_lucidrains()
        net = package.Unet(dim=64, dim_mults=(1, 2, 4, 8), flash_attn=True)
        diffusion = package.GaussianDiffusion(
            net, image_size=self.data.size, timesteps=1000, sampling_timesteps=250
        )
        trainer = package.Trainer(
            diffusion,
            str(self.pictures()),
            train_batch_size=32,
            train_lr=8e-5,
            gradient_accumulate_every=2,
            ema_decay=0.995,
            calculate_fid=False,
            save_and_sample_every=10**9,
            results_folder=str(self.folder),
        )
        if (self.folder / "model-0.pt").exists():
            trainer.load(0)
        return trainer

    def pictures(self) -> Path:
        """Return a folder of the training images as PNGs, written once."""
        folder = self.folder.parent / "pictures"
        if not (folder / "complete").exists():
            from PIL import Image

            folder.mkdir(parents=True, exist_ok=True)
            dataset = open_images(self.data.train, size=self.data.size, channels=3)
            for i in range(len(dataset)):
                pixels = dataset.batch([i])[0][0].permute(1, 2, 0).numpy()
                Image.fromarray(pixels).save(folder / f"{i:06d}.png")
            (folder / "complete").touch()
        return folder

    def table(self) -> Table:
        """Return its table of noise levels."""
        table = ddpm(self.trainer().model.betas.double())
        assert isinstance(table, Table)
        return table

    def averaged(self) -> nn.Module:
        """Return the averaged network of the last save."""
        return self.trainer().ema.ema_model.model

    def advance(self, images: int) -> None:
        """Train until `images` have been seen, and save."""
        torch.manual_seed(0)
        trainer = self.trainer()
        trainer.train_num_steps = images // self.batch
        trainer.train()
        trainer.save(0)
