"""Two towers that tell which caption belongs to which drawing; trained here, nothing is downloaded.

`train_encoder` trains a T5 of two layers together with a network that sees the drawings (CLIP,
arXiv 2103.00020, in small), in place of pretraining: its states are the words that a text-to-image
network reads. `train_scorer` trains a new image tower, from another seed, on those states as they
are; it is the judge of what that network draws. Both see the training part alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from mezzotint.data.text_encoder import MAX_TOKENS, open_text_encoder

SIDE = 64  # of the drawings that the towers see, in pixels
WIDTH = 128  # of the encoder's states
JOINT = 128  # of the space where drawings and captions meet
VOCABULARY = 4096
BATCH = 128
WORD_DROP = 0.2  # probability that a training caption lacks a word of it


class ImageTower(nn.Module):
    """A convolutional network: drawings (b, 3, h, w), in 0 to 255 -> unit vectors (b, JOINT)."""

    def __init__(self) -> None:
        super().__init__()
        # (channels, kernel, stride): 64 pixels -> 16 -> 8 -> 4
        shapes = ((48, 8, 4), (96, 3, 2), (192, 3, 2), (192, 3, 1))
        layers, channels = [], 3
        for width, kernel, stride in shapes:
            layers += [
                nn.Conv2d(channels, width, kernel, stride, padding=(kernel - 1) // 2, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
            ]
            channels = width
        self.layers = nn.Sequential(*layers)
        self.out = nn.Linear(2 * channels, JOINT)

    def forward(self, pixels: Tensor) -> Float[Tensor, "b d"]:
        """Return unit vectors for drawings of any size, averaged to SIDE pixels."""
        x = self.layers(shrink(pixels) / 127.5 - 1)
        pooled = torch.cat([x.mean((-2, -1)), x.amax((-2, -1))], dim=1)
        return F.normalize(self.out(pooled), dim=1)


class TextTower(nn.Module):
    """The mean of a caption's states, projected: (b, t, WIDTH) and their mask -> (b, JOINT)."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, JOINT))

    def forward(self, states: Tensor, mask: Tensor) -> Float[Tensor, "b d"]:
        """Return unit vectors for captions."""
        weight = mask.unsqueeze(-1).float()
        mean = (states * weight).sum(1) / weight.sum(1).clamp_min(1)
        return F.normalize(self.out(mean), dim=1)


def shrink(pixels: Tensor) -> Float[Tensor, "n 3 h w"]:
    """Return drawings averaged to SIDE pixels a side, in 0 to 255."""
    return F.interpolate(pixels.float(), size=(SIDE, SIDE), mode="area")


def contrastive_loss(images: Tensor, texts: Tensor, log_scale: Tensor, same: Tensor) -> Tensor:
    """Return CLIP's symmetric cross entropy; drawings with the same caption share the target.

    Args:
        images, texts: unit vectors (b, d).
        log_scale: of the logits.
        same: (b, b), whether two rows have the same caption.
    """
    # CLIP figure 3: logits = exp(t) I T^t, cross entropy over rows and over columns
    logits = log_scale.clamp(max=math.log(100)).exp() * images @ texts.T
    target = same / same.sum(1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def augment(
    pixels: Float[Tensor, "b 3 h w"], generator: torch.Generator
) -> Float[Tensor, "b 3 h w"]:
    """Mirror half of the drawings, scale them by 0.75 to 1.1, and move them a little, on white."""
    count = len(pixels)
    draw = torch.rand(count, 4, generator=generator)
    scale = 1 / (0.75 + 0.35 * draw[:, 0])
    flip = torch.where(draw[:, 1] < 0.5, -1.0, 1.0)
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = scale * flip, scale
    theta[:, :, 2] = (draw[:, 2:] - 0.5) * 0.3
    ink = 255 - pixels  # affine sampling pads with zero: no ink
    grid = F.affine_grid(theta, list(ink.shape), align_corners=False)
    return 255 - F.grid_sample(ink, grid, align_corners=False)


def make_tokenizer(captions: Sequence[str], folder: Path) -> None:
    """Save a tokenizer of pieces of words, as T5's is, whose pieces come from these captions."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "</s>", "<unk>"]
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Punctuation(), pre_tokenizers.Metaspace()]
    )
    trainer = trainers.UnigramTrainer(
        vocab_size=VOCABULARY, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(captions, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def train_encoder(
    pixels: UInt8[Tensor, "n 3 h w"], captions: Sequence[str], folder: Path, steps: int, seed: int
) -> None:
    """Train a T5 encoder of two layers with an image tower, and save it with its tokenizer."""
    from transformers import AutoTokenizer, T5Config, T5EncoderModel

    folder.mkdir(parents=True, exist_ok=True)
    make_tokenizer(captions, folder)
    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    torch.manual_seed(seed)
    model = T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=WIDTH,
            d_kv=32,
            d_ff=2 * WIDTH,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.1,
        )
    )
    rows = tokenizer(list(captions))["input_ids"]
    tower, text = ImageTower(), TextTower()
    generator = torch.Generator().manual_seed(seed)
    number = _number(captions)

    def encode(chosen: Tensor) -> Tensor:
        kept = [_drop_words(rows[i], generator) for i in chosen.tolist()]
        ids = torch.zeros(len(kept), max(map(len, kept)), dtype=torch.long)
        for row, tokens in zip(ids, kept, strict=True):
            row[: len(tokens)] = torch.tensor(tokens)
        mask = ids != 0
        return text(model(input_ids=ids, attention_mask=mask).last_hidden_state, mask)

    parameters = [*model.parameters(), *tower.parameters(), *text.parameters()]
    _optimise(parameters, pixels, tower, encode, number, steps, generator)
    model.save_pretrained(folder)


def _drop_words(tokens: list[int], generator: torch.Generator) -> list[int]:
    """Drop some pieces, never all, and never the end token."""
    kept = torch.rand(len(tokens) - 1, generator=generator) >= WORD_DROP
    pieces = [t for t, keep in zip(tokens[:-1], kept.tolist(), strict=True) if keep]
    return [*(pieces or tokens[:-1]), tokens[-1]]


def _number(captions: Sequence[str]) -> Tensor:
    numbers = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}
    return torch.tensor([numbers[caption] for caption in captions])


def _optimise(parameters, pixels, tower, encode, number, steps, generator) -> None:
    pixels = shrink(pixels)
    log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # CLIP section 2.5
    optimiser = torch.optim.AdamW([*parameters, log_scale], lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-3, total_steps=steps)
    for step in range(steps):
        chosen = torch.randint(len(pixels), (BATCH,), generator=generator)
        images = tower(augment(pixels[chosen], generator))
        same = (number[chosen, None] == number[None, chosen]).float()
        loss = contrastive_loss(images, encode(chosen), log_scale, same)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if (step + 1) % 200 == 0:
            print(f"step {step + 1}/{steps}: contrastive loss {loss.item():.3f}", flush=True)


class Scorer:
    """Cosine similarities of drawings and captions.

    Args:
        encoder: folder of a text encoder whose states are WIDTH wide.
        tower, text: trained networks.
    """

    def __init__(self, encoder: Path, tower: ImageTower, text: TextTower):
        self.encoder = open_text_encoder(str(encoder), max_tokens=MAX_TOKENS)
        self.tower, self.text = tower.eval(), text.eval()

    @torch.no_grad()
    def images(self, pixels: UInt8[Tensor, "n 3 h w"]) -> Float[Tensor, "n d"]:
        """Return a unit vector for each drawing."""
        return torch.cat([self.tower(part) for part in pixels.split(256)])

    @torch.no_grad()
    def captions(self, captions: Sequence[str]) -> Float[Tensor, "n d"]:
        """Return a unit vector for each caption."""
        text, mask = self.encoder.conditions(captions)
        return self.text(text.float(), mask)


def train_scorer(
    pixels: UInt8[Tensor, "n 3 h w"], captions: Sequence[str], encoder: Path, steps: int, seed: int
) -> Scorer:
    """Train an image tower and a projection of the encoder's states; the encoder stays as it is."""
    torch.manual_seed(seed)
    scorer = Scorer(encoder, ImageTower(), TextTower())
    number = _number(captions)
    states, mask = scorer.encoder.conditions(list(dict.fromkeys(captions)))
    longest = int(mask.sum(1).max())
    states, mask = states[:, :longest].float(), mask[:, :longest]
    generator = torch.Generator().manual_seed(seed)

    def encode(chosen: Tensor) -> Tensor:
        k = number[chosen]
        kept = mask[k] & (torch.rand(BATCH, longest, generator=generator) >= WORD_DROP)
        return scorer.text(states[k], kept)

    scorer.tower.train(), scorer.text.train()
    parameters = [*scorer.tower.parameters(), *scorer.text.parameters()]
    _optimise(parameters, pixels, scorer.tower, encode, number, steps, generator)
    scorer.tower.eval(), scorer.text.eval()
    return scorer


def save_scorer(scorer: Scorer, folder: Path) -> None:
    """Write the two trained networks of a scorer; its encoder stays where it is."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(scorer.tower.state_dict(), folder / "images.safetensors")
    save_file(scorer.text.state_dict(), folder / "captions.safetensors")


def load_scorer(encoder: Path, folder: Path) -> Scorer:
    """Return the scorer that `save_scorer` wrote."""
    scorer = Scorer(encoder, ImageTower(), TextTower())
    scorer.tower.load_state_dict(load_file(folder / "images.safetensors"))
    scorer.text.load_state_dict(load_file(folder / "captions.safetensors"))
    return scorer


def retrieval_ranks(
    scorer: Scorer, pixels: Tensor, captions: Sequence[str], among: int, seed: int
) -> Tensor:
    """Return how many of `among` - 1 other captions fit each drawing at least as well as its own.

    Args:
        scorer: the judge.
        pixels: uint8 (n, 3, h, w).
        captions: of each drawing; the others are drawn from the different ones among them.
        among: number of captions to choose from, with the right one.
        seed: of that draw.

    Errors: ValueError if there are fewer different captions.
    """
    distinct = list(dict.fromkeys(captions))
    if len(distinct) < among:
        raise ValueError(f"{len(distinct)} different captions; retrieval among {among} needs them")
    texts, images = scorer.captions(distinct), scorer.images(pixels)
    own = torch.tensor([distinct.index(caption) for caption in captions])
    similarity = images @ texts.T
    generator = torch.Generator().manual_seed(seed)
    ranks = []
    for row, k in zip(similarity, own.tolist(), strict=True):
        others = torch.randperm(len(distinct), generator=generator)
        others = others[others != k][: among - 1]
        ranks.append(int((row[others] >= row[k]).sum()))
    return torch.tensor(ranks)
