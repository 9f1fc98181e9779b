"""Export: the same numbers from torch.export, ONNX and diffusers; model cards and the hub."""

from __future__ import annotations

import dataclasses
import functools
import json
import types
import warnings
from pathlib import Path

import huggingface_hub
import jaxtyping
import pytest
import torch
import yaml

import mezzotint as mz
from mezzotint import config
from mezzotint.convert import export, model_card
from mezzotint.evaluate.results import Evaluation, Number, Protocol
from mezzotint.recipes import recipe_for

NARROW = {
    "unet-tiny": {"num_classes": 10, "size": 16},
    "uvit-tiny": {"num_classes": 10},
    "dimr-tiny": {
        "dims": (16, 8, 8),
        "hidden_dims": (32, 16, 16),
        "depths": (3, 1, 1),
        "size": 16,
        "heads": 2,
    },
    "diffit-tiny": {},
    "diffit-latent-tiny": {},
    "sid2-tiny": {"size": 32},
    "jit-tiny": {"size": 16, "depth": 3},
}


def trained(preset, **overrides):
    """A network none of whose outputs is zero, as after training."""
    torch.manual_seed(0)
    model = mz.create_model(preset, **{**NARROW[preset], **overrides}).eval().requires_grad_(False)
    for weight in model.backbone.parameters():
        if not weight.any():
            weight.normal_(0, 0.02)
    return model


@pytest.fixture(scope="module")
def unet():
    return trained("unet-tiny")


@pytest.fixture
def folder(unet, tmp_path):
    mz.save_model(unet, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def traceable():
    """Switch shape checks off: they read sizes as numbers, which makes the batch a constant."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


FEW_BLOCKS = {
    "unet-tiny": {
        "width": 8, "emb_dim": 16, "multipliers": (1, 1), "blocks": (1, 1),
        "attention": (False, True),
    }
}  # fmt: skip
LARGER = [
    pytest.param(name, marks=pytest.mark.slow)
    for name in (
        "dimr-tiny", "diffit-tiny", "diffit-latent-tiny", "uvit-tiny", "sid2-tiny", "jit-tiny"
    )
]  # fmt: skip


@pytest.mark.parametrize("preset", ["unet-tiny", *LARGER[:2]])
@pytest.mark.usefixtures("traceable")
def test_a_network_with_an_augmentation_label_is_exported_without_it(preset, tmp_path):
    model = trained(preset, **FEW_BLOCKS.get(preset, {}), augment_label=True)
    assert export.save_torch(model, tmp_path / "denoiser.pt2") < 1e-5
    back = torch.export.load(tmp_path / "denoiser.pt2").module()
    inputs = export.example_inputs(model, 5)
    ours = model(inputs[0], inputs[1], mz.Cond(label=inputs[2] if len(inputs) == 3 else None))
    assert torch.allclose(ours.x, back(*inputs)[0], atol=1e-5)


@pytest.mark.parametrize("preset", ["unet-tiny", *LARGER])
@pytest.mark.usefixtures("traceable")
def test_torch_export_gives_the_same_numbers_at_any_batch(preset, tmp_path):
    model = trained(preset, **FEW_BLOCKS.get(preset, {}))
    assert export.save_torch(model, tmp_path / "denoiser.pt2") < 1e-5
    with (tmp_path / "denoiser.pt2").open("rb") as file:
        kept = {"config.json": ""}
        back = torch.export.load(file, extra_files=kept).module()
    assert json.loads(kept["config.json"])["backbone"] == model.info.backbone
    for batch in (1, 5):
        inputs = export.example_inputs(model, batch)
        ours = model(inputs[0], inputs[1], mz.Cond(label=inputs[2] if len(inputs) == 3 else None))
        for a, b in zip([t for t in ours if t is not None], back(*inputs), strict=True):
            assert torch.allclose(a, b, atol=1e-5)
    assert [p.name for p in tmp_path.iterdir()] == ["denoiser.pt2"]


@pytest.mark.parametrize("preset", ["unet-tiny", *LARGER])
@pytest.mark.usefixtures("traceable")
def test_onnx_gives_the_same_numbers(preset, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    model = trained(preset, **FEW_BLOCKS.get(preset, {}))
    assert export.save_onnx(model, tmp_path / "denoiser.onnx") < 1e-5
    graph = onnx.load(tmp_path / "denoiser.onnx")
    inputs, outputs = export.tensor_names(model)
    assert [i.name for i in graph.graph.input] == inputs
    assert [o.name for o in graph.graph.output] == outputs
    assert {o.version for o in graph.opset_import if o.domain == ""} == {export.OPSET}
    assert not graph.graph.input[0].type.tensor_type.shape.dim[0].HasField("dim_value"), (
        "the batch is free"
    )
    (card,) = [json.loads(p.value) for p in graph.metadata_props if p.key == "mezzotint"]
    assert card["backbone"] == model.info.backbone


def test_names_say_what_a_model_has():
    assert export.tensor_names(trained("diffit-latent-tiny"))[1] == ["x", "eps", "var"]
    assert export.tensor_names(trained("unet-tiny", num_classes=0)) == (
        ["z", "logsnr"],
        ["x", "eps"],
    )


def test_max_relative_difference_sees_swapped_labels(unet):
    assert export.max_relative_difference(unet, lambda *a: export.FlatDenoiser(unet)(*a)) == 0
    assert (
        export.max_relative_difference(
            unet, lambda z, t, y: export.FlatDenoiser(unet)(z, t, y.flip(0))
        )
        > 1e-6
    )


def test_what_cannot_be_traced_is_a_value_error(folder, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="multiples of"):
        export.export_model(folder, tmp_path / "x.pt2", "torch", size=15)
    with pytest.raises(ValueError, match="leave --size out"):
        export.export_model(folder, tmp_path / "x", "diffusers", size=16)

    def impossible(*args, **kwargs):
        raise RuntimeError("data-dependent branch\nand a long trace")

    monkeypatch.setattr(torch.export, "export", impossible)
    with pytest.raises(
        ValueError,
        match=r"torch.export cannot take the backbone unet: data-dependent branch \(--to",
    ):
        export.export_model(folder, tmp_path / "x.pt2", "torch")
    assert not (tmp_path / "x.pt2").exists()


def load_pipeline(folder):
    diffusers = pytest.importorskip("diffusers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of diffusers and what it imports
        return diffusers.DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)


def test_diffusers_gives_the_same_images(unet, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers.utils.constants.HF_MODULES_CACHE", str(tmp_path / "modules"))
    assert "from_pretrained" in export.export_model(folder, tmp_path / "pipe", "diffusers")[0]
    pipe = load_pipeline(tmp_path / "pipe")
    ours = mz.sample(unet, [3, 8], label=[1, 2], steps=3, guidance=2.0, sampler="heun")
    how = {"num_inference_steps": 3, "guidance_scale": 2.0, "sampler": "heun"}
    theirs = pipe(seeds=[3, 8], label=[1, 2], output_type="latent", **how).images
    assert torch.equal(ours, theirs)
    images = pipe(seeds=[3, 8], label=[1, 2], **how).images
    assert [p.size for p in images] == [(16, 16), (16, 16)]
    array = pipe(seeds=3, label=1, output_type="np", **how).images
    assert array.shape == (1, 16, 16, 3)
    assert 0 <= array.min() <= array.max() <= 1
    with pytest.raises(ValueError, match="pil, np, pt or latent"):
        pipe(output_type="jpg")
    pipe.to("cpu").save_pretrained(tmp_path / "again")
    again = load_pipeline(tmp_path / "again")
    assert torch.equal(again(seeds=[3, 8], label=[1, 2], output_type="latent", **how).images, ours)


@pytest.fixture
def pipe(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers.utils.constants.HF_MODULES_CACHE", str(tmp_path / "modules"))
    export.export_model(folder, tmp_path / "pipe", "diffusers")
    return load_pipeline(tmp_path / "pipe")


def test_the_pipeline_takes_diffusers_arguments(unet, pipe):
    def latents(**given):
        return pipe(num_inference_steps=1, output_type="latent", return_dict=False, **given)[0]

    def ours(seeds, label):
        return mz.sample(unet, seeds, label=label, steps=1)

    def generator(seed):
        return torch.Generator().manual_seed(seed)

    for given in (
        {"batch_size": 2}, {"batch_size": 2, "class_labels": 1}, {"class_labels": [1, 1]},
        {"label": torch.tensor([1, 1]), "seeds": torch.arange(2)}, {"seeds": 0, "batch_size": 2},
    ):  # fmt: skip
        label = 1 if {"class_labels", "label"} & given.keys() else None
        assert torch.equal(latents(**given), ours([0, 1], label))
    assert latents().shape == (1, 3, 16, 16)
    # A generator draws one seed per image; the next call draws the next ones.
    one = generator(4)
    first, second = (latents(generator=one, batch_size=2) for _ in range(2))
    assert torch.equal(first, latents(generator=generator(4), batch_size=2))
    assert not torch.equal(first, second)
    pair = latents(generator=[generator(4), generator(5)], class_labels=[1, 2])
    assert torch.equal(pair[:1], latents(generator=generator(4), class_labels=1))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"eta": 1.0}, "eta .* sampler"), ({"height": 16, "width": 16}, "width .* size="),
        ({"num_images_per_prompt": 2}, "batch_size"), ({"clas_labels": 1}, "mean class_labels"),
        ({"seeds": 1, "generator": torch.Generator()}, "not both"), ({"batch_size": 0}, "or more"),
        ({"label": 1, "class_labels": 1}, "one argument"), ({"prompt": "a cat"}, "no text"),
        ({"seeds": [1, 2], "batch_size": 3}, "2 seeds"), ({"seeds": [1.5]}, "1.5"),
        ({"generator": [torch.Generator()], "batch_size": 2}, "1 seeds or generators"),
        ({"seeds": [1, 2], "class_labels": [0, 1, 2]}, "3 labels for 2 seeds"),
    ],
)  # fmt: skip
def test_arguments_the_pipeline_does_not_take_are_named(pipe, given, message):
    with pytest.raises(ValueError, match=message):
        pipe(num_inference_steps=1, **given)


def test_the_pipeline_saves_and_pushes_as_diffusers_does(unet, pipe, tmp_path, monkeypatch):
    pipe.save_pretrained(
        tmp_path / "a", safe_serialization=True, variant=None, max_shard_size="5GB"
    )
    assert torch.equal(
        load_pipeline(tmp_path / "a")(seeds=3, num_inference_steps=1, output_type="latent").images,
        mz.sample(unet, 3, steps=1),
    )
    for other in ({"safe_serialization": False}, {"variant": "fp16"}, {"private": True}):
        with pytest.raises(ValueError, match="leave out"):
            pipe.save_pretrained(tmp_path / "b", **other)
        assert not (tmp_path / "b").exists()
    # The hub's two calls are replaced; everything between them is diffusers' own.
    import diffusers.utils.hub_utils as hub

    made, uploaded = [], {}

    def create_repo(name, **options):
        made.append(name)
        return types.SimpleNamespace(repo_id=f"me/{name}")

    def upload_folder(*, repo_id, folder_path, **options):
        names = {str(p.relative_to(folder_path)) for p in Path(folder_path).rglob("*.*")}
        uploaded[repo_id] = names

    monkeypatch.setattr(hub, "create_repo", create_repo)
    monkeypatch.setattr(hub, "upload_folder", upload_folder)
    monkeypatch.setattr(
        hub, "load_or_create_model_card", lambda *a, **k: huggingface_hub.ModelCard("---\n---\n")
    )
    pipe.push_to_hub("x")
    pipe.save_pretrained(tmp_path / "y", push_to_hub=True)
    assert made == ["x", "y"]
    for repository in ("me/x", "me/y"):
        assert {"model_index.json", "network/model.safetensors"} <= uploaded[repository]


def test_another_pipelines_folder_is_not_overwritten(unet, tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "DiTPipeline"}')
    with pytest.raises(ValueError, match="another pipeline"):
        export.save_diffusers(unet, tmp_path)


@pytest.fixture
def quick(monkeypatch):
    """Make sample grids of few seeds and steps."""
    monkeypatch.setattr(
        model_card,
        "save_sample_grid",
        functools.partial(model_card.save_sample_grid, count=2, steps=2),
    )


@pytest.fixture
def run(unet, tmp_path, quick):
    """A run folder with an evaluation in it."""
    folder = tmp_path / "runs" / "flowers"
    mz.save_model(unet, folder / "model")
    recipe = config.override(
        recipe_for("unet-tiny"), ["data.source='/home/someone/flowers'", "images=640", "batch=64"]
    )
    (folder / "recipe.yaml").write_text(config.to_yaml(recipe))
    (folder / "log.jsonl").write_text('{"images": 640, "loss": 0.125}\n')
    number = Number(
        metric="FID",
        value=12.5,
        features={"name": "inception-2048", "hash": "a" * 64},
        low=12.0,
        high=13.0,
    )
    protocol = Protocol(
        source="/home/someone/runs/flowers",
        num_images=5000,
        code_version="0.1.0",
        sampler="ddim",
        steps=50,
    )
    Evaluation(protocol=protocol, numbers=(number,)).save(folder / "evaluation.json")
    (folder / "other.json").write_text("{}")
    return folder


def test_the_card_says_how_the_model_was_made(run):
    place = model_card.write_card(run, licence="cc-by-4.0")
    assert place == run / "model"
    text = (place / "README.md").read_text()
    _, head, body = text.split("---\n", 2)
    meta = yaml.safe_load(head)
    assert meta["license"] == "cc-by-4.0"
    assert meta["library_name"] == "mezzotint"
    (result,) = meta["model-index"][0]["results"]
    assert result["metrics"][0] == {"name": "FID", "type": "fid", "value": 12.5}
    for words in (
        "batches of 64",
        "loss over the last",
        "0.125",
        "| FID | 12.5 (12 to 13)",
        "steps: 50",
        "samples.png",
    ):
        assert words in body
    assert "/home/someone" not in text, "the path of the data is private"
    assert (place / "samples.png").stat().st_size > 100


def test_the_card_shows_the_newest_grid(run):
    (run / "samples").mkdir()
    for images in (64, 640):
        (run / "samples" / f"{images:012d}.png").write_bytes(f"grid {images}".encode())
    model_card.write_card(run)
    assert (run / "model" / "samples.png").read_bytes() == b"grid 640"
    model_card.write_card(run, fresh=True)
    assert (run / "model" / "samples.png").read_bytes()[:4] == b"\x89PNG"


def test_a_model_folder_has_a_card_without_a_run(folder, quick):
    assert model_card.write_card(folder) == folder
    text = (folder / "README.md").read_text()
    assert "was not evaluated" in text
    assert "not stated" in text
    assert "## Training" not in text
    with pytest.raises(ValueError, match="no folder"):
        model_card.write_card(folder / "nothing")


class Hub:
    """Records what is pushed to it, or raises `error`."""

    def __init__(self, error=None):
        self.error = error
        self.calls = []

    def create_repo(self, repo_id, *, private=None, exist_ok=False):
        if self.error is not None:
            raise self.error
        self.calls.append(("create", repo_id, private, exist_ok))

    def upload_folder(self, *, repo_id, folder_path, commit_message, allow_patterns):
        self.calls.append(("upload", repo_id, folder_path, sorted(allow_patterns)))
        return type("Commit", (), {"commit_url": f"https://hub/{repo_id}/commit/1"})()


def test_push_sends_the_model_and_nothing_else(folder):
    hub = Hub()
    assert (
        model_card.push_to_hub(folder, "someone/flowers", private=True, hub=hub)
        == "https://hub/someone/flowers/commit/1"
    )
    files = ["README.md", "config.json", "model.safetensors", "samples.png"]
    assert hub.calls == [
        ("create", "someone/flowers", True, True),
        ("upload", "someone/flowers", folder, files),
    ]


@pytest.mark.parametrize("codec", ["vae", "deep/er/vae", "{}/vae", r"C:\data\vae"])
def test_push_publishes_no_local_folder(unet, codec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = {"encoder": str(tmp_path / "t5"), "encoder_hash": "0", "max_tokens": 8}
    info = dataclasses.replace(unet.info, codec=codec.format(tmp_path), extra={"text": text})
    mz.save_model(mz.Model(unet.backbone, unet.parameterisation, info), tmp_path / "model")
    before = (tmp_path / "model" / "config.json").read_bytes()

    class ReadingHub(Hub):
        def upload_folder(self, *, folder_path, **_):
            loaded = mz.load_model(folder_path).info  # the hashes fit
            self.calls.append((loaded.codec, loaded.extra["text"]["encoder"]))
            return types.SimpleNamespace(commit_url="")

    hub = ReadingHub()
    model_card.push_to_hub(tmp_path / "model", "someone/flowers", hub=hub)
    assert hub.calls[1] == ("vae", "t5")
    assert (tmp_path / "model" / "config.json").read_bytes() == before


def test_a_failed_push_is_a_value_error(folder, tmp_path):
    with pytest.raises(ValueError, match="flowers"):
        model_card.push_to_hub(folder, "flowers", hub=Hub())
    with pytest.raises(ValueError, match="--flowers"):
        model_card.push_to_hub(folder, "someone/--flowers..", hub=Hub())
    with pytest.raises(ValueError, match=r"has no config.json"):
        model_card.push_to_hub(tmp_path, "someone/flowers", hub=Hub())
    with pytest.raises(ValueError, match="no route"):
        model_card.push_to_hub(folder, "someone/flowers", hub=Hub(ConnectionError("no route")))
    with pytest.raises(
        ValueError, match="HF_HUB_OFFLINE"
    ):  # the tests run offline, and the real hub says so
        model_card.push_to_hub(folder, "someone/flowers")


@pytest.mark.parametrize(
    "content",
    [
        b"#!/bin/sh\nmezzotint train unet-tiny\n",
        b"mezzotint",
        b"\x08mezzotint",
        b"notes on mezzotint" * 9,
    ],
)
def test_a_file_that_speaks_of_mezzotint_is_no_export(content, tmp_path):
    path = tmp_path / "mine.onnx"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is not an export of mezzotint"):
        export.save_onnx(mz.create_model("unet-tiny", size=8), path)
    assert path.read_bytes() == content


@pytest.mark.parametrize("name", ["graph.json", "train.sh", "model.pt2"])
def test_an_onnx_graph_has_its_ending(name, tmp_path):
    with pytest.raises(ValueError, match=r"does not end in \.onnx"):
        export.save_onnx(mz.create_model("unet-tiny", size=8), tmp_path / name)
    assert not any(tmp_path.iterdir())
