"""Captions: embedded once, cached, dropped for guidance, masked, and used by the network."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import mezzotint.data.caption_embeddings as embeddings_module
from helpers.data import open_recipe_data
from helpers.tiny_t5 import saved_t5
from mezzotint import config
from mezzotint.cli import main, training
from mezzotint.data.caption_embeddings import describe_captions, embed_captions, unique_captions
from mezzotint.data.image_dataset import open_images
from mezzotint.data.loader import load_batches
from mezzotint.data.prepare import prepare_captions, prepare_source
from mezzotint.data.text_encoder import open_text_encoder
from mezzotint.data.transforms import to_uint8
from mezzotint.evaluate.during_training import make_evaluator
from mezzotint.evaluate.features import from_module
from mezzotint.evaluate.image_source import from_dataset
from mezzotint.evaluate.references import make_reference
from mezzotint.models import create_model, load_model, preset_info, save_model
from mezzotint.process.denoiser import Cond
from mezzotint.recipes import recipe_for
from mezzotint.sampling.job import make_job
from mezzotint.sampling.sample import generate, sample
from mezzotint.sampling.settings import Guidance, SamplingSettings
from mezzotint.train.loop import train
from mezzotint.train.step import make_batch

transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MEZZOTINT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def t5(tmp_path_factory) -> Path:
    """A tiny random T5 encoder with a tokenizer of whole words, as transformers saves them."""
    return saved_t5(tmp_path_factory.mktemp("t5"), seed=0)


CAPTIONS = [
    "a red ring",
    None,
    "a green square at the top left",
    "a red ring",
    "  ",
    "in the centre",
]


# --- reading and caching


def test_states_are_those_of_transformers(t5):
    own = open_text_encoder(str(t5))
    model = transformers.T5EncoderModel.from_pretrained(t5).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(t5)
    with torch.no_grad():
        expected = model(input_ids=tokenizer("a red ring", return_tensors="pt")["input_ids"])
    torch.testing.assert_close(own.encode("a red ring"), expected.last_hidden_state[0])
    assert own.encode("a red ring").shape == (4, 16)  # three words and the end
    assert own.encode("").shape == (0, 16)


def test_embeddings_are_by_image_padded_and_masked(t5):
    own = open_text_encoder(str(t5))
    words = embed_captions(CAPTIONS, own)
    assert (len(words), words.width, words.max_tokens) == (6, 16, 8)
    text, mask = words.batch([0, 1, 2, 3, 4, 5])
    assert mask.sum(1).tolist() == [4, 0, 8, 4, 0, 4]
    for row in (0, 2, 3, 5):
        states = own.encode(CAPTIONS[row] or "")
        assert torch.equal(text[row, : len(states)], states.half())
    assert not text[~mask].any()
    assert "3 distinct captions for 6 images" in describe_captions(words)[0]
    assert "2 images have no caption" in describe_captions(words)[1]


def test_prompts_are_embedded_like_training_captions(t5):
    own = open_text_encoder(str(t5), max_tokens=8)
    text, mask = embed_captions(CAPTIONS, own).batch([2, 0, 1])
    again, again_mask = own.conditions(["a green square at the top left", "a red ring", ""])
    assert torch.equal(text, again)
    assert torch.equal(mask, again_mask)


def test_the_cache_is_keyed_by_encoder_tokenizer_and_captions(t5, tmp_path, monkeypatch):
    own = open_text_encoder(str(t5))
    folders = {
        embed_captions(CAPTIONS, own).folder,
        embed_captions(CAPTIONS[::-1], own).folder,
        embed_captions(["a red ring"], own).folder,
    }
    folders.add(
        embed_captions(
            ["a red ring"], open_text_encoder(str(saved_t5(tmp_path / "other", seed=1)))
        ).folder
    )
    changed = Path(shutil.copytree(t5, tmp_path / "changed"))
    tokenizer = json.loads((changed / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["red"], vocabulary["green"] = vocabulary["green"], vocabulary["red"]
    (changed / "tokenizer.json").write_text(json.dumps(tokenizer))
    folders.add(embed_captions(["a red ring"], open_text_encoder(str(changed))).folder)
    assert len(folders) == 5
    monkeypatch.setattr(embeddings_module, "_write_shard", lambda *_: pytest.fail("embedded twice"))
    embed_captions(CAPTIONS, own)


def test_long_captions_are_cut_counted_and_keep_their_end(t5):
    own = open_text_encoder(str(t5), max_tokens=5)
    words = embed_captions(["red " * 50, "a ring"], own)
    assert words.batch([0, 1])[1].sum(1).tolist() == [5, 3]
    assert own.tokens("red " * 50)[0][-1] == own.tokens("a ring")[0][-1]
    assert "1 captions were cut to 5 tokens" in describe_captions(words)[-1]


def test_captions_from_columns_files_and_metadata(tmp_path):
    import datasets

    rng = np.random.default_rng(0)
    for i in range(4):
        Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    (tmp_path / "0.txt").write_text("a red ring\n")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "2.png", "caption": "a blue square"}\n')
    images = open_images(tmp_path, size=8)
    assert [images.text(i) for i in range(4)] == ["a red ring", None, "a blue square", None]
    assert (unique_captions([images.text(i) for i in range(4)]).numbers < 0).sum() == 2
    columns = {"image": [str(tmp_path / "0.png")] * 2, "caption": ["a ring", "a circle"]}
    rows = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    rows.save_to_disk(str(tmp_path / "rows"))
    assert [open_images(tmp_path / "rows", size=8).text(i) for i in range(2)] == [
        "a ring",
        "a circle",
    ]


def test_folders_without_encoder_are_refused(tmp_path, t5):
    with pytest.raises(ValueError, match="no image has a caption"):
        embed_captions([None, " "], open_text_encoder(str(t5)))
    with pytest.raises(ValueError, match="holds no encoder"):
        open_text_encoder(str(tmp_path))
    with pytest.raises(ValueError, match="neither a folder nor OWNER/NAME"):
        open_text_encoder("t5")
    with pytest.raises(ValueError) as error:
        open_text_encoder("google/t5-v1_1-xxl")
    for part in (
        "not on this machine",
        "mezzotint download google/t5-v1_1-xxl",
        str(tmp_path / "cache" / "text"),
    ):
        assert part in str(error.value)
    other = Path(shutil.copytree(t5, tmp_path / "bert"))
    values = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**values, "model_type": "bert"}))
    with pytest.raises(ValueError, match="holds a 'bert' model"):
        open_text_encoder(str(other))
    (other / "config.json").write_text(json.dumps(values))
    (other / "model.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="cannot be read"):
        open_text_encoder(str(other))
    with pytest.raises(ValueError, match="max_tokens 0"):
        open_text_encoder(str(t5), max_tokens=0)


def test_training_finds_prepared_captions(t5, tmp_path, monkeypatch):
    prepare_source("shapes:16,count=20", tmp_path / "out", 16, progress=False)
    words = prepare_captions(tmp_path / "out", str(t5), progress=False)
    assert words[0].endswith(f"distinct captions for 20 images, embedded by {t5.resolve()}")
    monkeypatch.setattr(embeddings_module, "_write_shard", lambda *_: pytest.fail("embedded twice"))
    open_recipe_data(tiny(str(tmp_path / "out"), t5))


# --- training


def tiny(source: str, t5: Path, *changes: str) -> config.Recipe:
    own = [
        f"data.source={source!r}", f"data.text_encoder={str(t5)!r}", "model.size=16",
        "model.text_dim=16", "model.width=8",
        "model.emb_dim=16", "model.multipliers=[1,2]", "model.blocks=[1]", "model.depth=1",
        "model.heads=2",
        "model.transform=dwt", "model.patch=4", "images=32", "batch=8", "log_every_images=8",
        "samples.every_images=32", "samples.count=2", "samples.steps=2", "save.every_images=16",
        "engine.precision=float32", "optim.decay=constant",
    ]  # fmt: skip
    return config.override(recipe_for("uvit-text-tiny"), [*own, *changes])


def test_captions_are_dropped_with_the_given_probability_by_image_number(t5):
    recipe = tiny("shapes:16,count=50", t5, "label_drop=0.1")
    images = open_recipe_data(recipe)

    def masks(batch):
        feed = load_batches(images, seed=0, start_image=0, batch=batch)
        made = [
            make_batch(recipe, images, 0, next(feed), torch.device("cpu")).cond.text_mask
            for _ in range(2000 // batch)
        ]
        feed.close()
        return torch.cat([m for m in made if m is not None])

    dropped = ~masks(100).any(1)
    assert len(dropped) == 2000
    assert abs(dropped.double().mean() - 0.1) < 4 * (0.1 * 0.9 / 2000) ** 0.5
    assert torch.equal(masks(100), masks(8))


def test_each_image_comes_with_its_own_caption(t5):
    recipe = tiny("shapes:16,count=50", t5, "label_drop=0")
    images = open_recipe_data(recipe)
    feed = load_batches(images, seed=3, start_image=0, batch=10)
    loaded = next(feed)
    feed.close()
    from mezzotint.data.shuffle import shuffled_indices

    reader = open_text_encoder(str(t5))
    for row, i in enumerate(shuffled_indices(3, 0, 10, 50).tolist()):
        states = reader.encode(images.text(i) or "").half()
        assert loaded.text is not None
        assert torch.equal(loaded.text[row, : len(states)], states)
        assert torch.equal(loaded.inputs[row], images.image(i))


def test_a_run_on_captions_resumes_and_remembers_its_encoder(t5, tmp_path):
    recipe = tiny("shapes:16,count=50", t5, "samples.guidance=2.0")
    whole = train(recipe, tmp_path / "whole", quiet=True)
    shapes = open_images("shapes:16,count=50")
    assert (whole / "samples" / "captions.txt").read_text().splitlines() == [
        shapes.text(0),
        shapes.text(25),
    ]
    train(config.override(recipe, ["images=16"]), tmp_path / "part", quiet=True)
    part = train(recipe, tmp_path / "part", quiet=True)
    weights = [load_file(run / "model" / "model.safetensors") for run in (whole, part)]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    model = load_model(whole / "model").eval()
    kept = model.info.extra["text"]
    assert kept["encoder"] == str(t5.resolve())
    assert kept["encoder_hash"] == open_text_encoder(str(t5)).hash
    text, mask = open_text_encoder(kept["encoder"], max_tokens=kept["max_tokens"]).conditions(
        ["a red ring", "a blue square"]
    )
    images = generate(model, [0, 0], Cond(text=text, text_mask=mask), SamplingSettings(steps=2))
    assert images.shape == (2, 3, 16, 16)


def test_evaluation_during_training_uses_the_prompts_in_turn(t5, tmp_path):
    seen = colours()
    source = from_dataset(open_images("shapes:16,count=50"), "shapes", 50)
    make_reference(source, tmp_path / "real.npz", [seen], keep=50)
    (tmp_path / "prompts.txt").write_text("a red ring\n\na blue square\n")
    asked = [
        "evaluate.every_images=32", "evaluate.num_images=6", "evaluate.steps=2",
        f"evaluate.reference={tmp_path / 'real.npz'}",
    ]  # fmt: skip
    prompts = f"evaluate.prompts={tmp_path / 'prompts.txt'}"
    recipe = tiny("shapes:16,count=50", t5, *asked, prompts)
    train(recipe, tmp_path / "run", quiet=True, evaluator=make_evaluator(recipe, [seen]))
    card = json.loads((tmp_path / "run" / "evaluations" / "32.json").read_text())
    assert card["protocol"]["prompts"].startswith("2 in turn, SHA-256 ")
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["evaluation"]["FD-colours"] > 0 for line in lines if "evaluation" in line] == [
        True
    ]
    with pytest.raises(ValueError, match=r"evaluate\.prompts"):
        make_evaluator(tiny("shapes:16,count=50", t5, *asked), [seen])
    (tmp_path / "prompts.txt").write_text("\n")
    with pytest.raises(ValueError, match="holds no prompt"):
        make_evaluator(recipe, [seen])
    with pytest.raises(ValueError, match=r"evaluate\.prompts"):
        make_evaluator(config.override(recipe_for("unet-tiny"), [*asked, prompts]), [seen])


def colours():
    """The features "colours": the mean of each channel."""

    class Mean(torch.nn.Module):
        def forward(self, x):
            return x.mean((2, 3))

    return from_module(Mean(), name="colours", dims=3, size=16, channels=3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            ["data.text_encoder=''"],
            r"name a T5 encoder, e\.g\. data\.text_encoder=google-t5/t5-small",
        ),
        (["model.text_dim=24"], r"16 wide, the network reads 24; set model\.text_dim=16"),
        (["model.text_dim=0"], "reads no text; leave data.text_encoder out"),
    ],
)
def test_recipes_with_a_wrong_text_encoder_are_refused(t5, tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        train(tiny("shapes:16,count=50", t5, *changes), tmp_path / "run", quiet=True)


def test_images_without_captions_are_refused(t5, tmp_path):
    (tmp_path / "in").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "in" / "a.png")
    with pytest.raises(ValueError, match="no image has a caption"):
        train(tiny(str(tmp_path / "in"), t5), tmp_path / "run", quiet=True)


def test_a_network_that_is_not_square_trains_and_samples_in_its_own_size(t5, tmp_path):
    changes = ("model.size=[16,24]", "data.portrait=true", "images=16")
    run = train(tiny("shapes:count=20", t5, *changes), tmp_path / "run", quiet=True)
    model = load_model(run / "model").eval()
    assert model.info.config.size == (16, 24)
    assert model.backbone.positions.table.shape[2:] == (2, 3)
    assert sample(model, [0], text="a red ring", steps=1).shape == (1, 3, 16, 24)
    assert make_job(run, prompts=["a red ring"]).card(1, 0)["size"] == [16, 24]
    assert "16x24x3" in (run / "model" / "README.md").read_text()
    # A mean-pool to the reference gains what it gains for the square of this area.
    assert model.info.schedule.options["image_d"] == 64  # as the recipe sets it
    assert preset_info("uvit-tiny", size=(48, 32)).schedule.options["image_d"] == 39


def test_a_dry_run_says_what_this_machine_lacks_and_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("mezzotint.train.setup.memory_bytes", lambda _: 2**10)
    monkeypatch.setattr(training, "print_plan", lambda recipe: print("the plan"))
    source = "shapes:16,count=20"
    recipe = tiny(source, Path("google/t5-v1_1-xxl"))
    (tmp_path / "recipe.yaml").write_text(config.to_yaml(recipe))
    training.train(
        "uvit-text-tiny", recipe=tmp_path / "recipe.yaml", out=tmp_path / "run", dry_run=True
    )
    told = [line for line in capsys.readouterr().out.splitlines() if "would stop" in line]
    assert len(told) == 2
    assert "parameters need at least" in told[0]
    assert told[1].endswith(
        "text encoder google/t5-v1_1-xxl is not on this machine; mezzotint download "
        "google/t5-v1_1-xxl fetches it, or data.text_encoder names its folder"
    )
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "cache").exists()
    with pytest.raises(ValueError, match="parameters need at least"):
        train(recipe, tmp_path / "run", quiet=True)


# --- sampling


@pytest.fixture(scope="module")
def run(t5, tmp_path_factory) -> Path:
    """Train a few steps on captions, then move all parameters off their zero initialisation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEZZOTINT_CACHE", str(tmp_path_factory.mktemp("cache")))
        trained = train(tiny("shapes:16,count=50", t5), tmp_path_factory.mktemp("run"), quiet=True)
    model, folder = load_model(trained / "model"), tmp_path_factory.mktemp("model") / "model"
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    save_model(model, folder)
    return folder


def test_prompts_are_used_in_turn_and_affect_only_their_image(run):
    job = make_job(
        run, {"steps": 2, "guidance": Guidance(scale=2.0)}, prompts=["a red ring", "a blue square"]
    )
    pictures = job.draw([0, 1, 2, 3])
    assert torch.equal(pictures[1], job.draw([1])[0])
    assert torch.equal(pictures[3], sample_one(run, 3, "a blue square"))
    other = make_job(run, {"steps": 2, "guidance": Guidance(scale=2.0)}, prompts=["a green circle"])
    assert not torch.equal(pictures[0], other.draw([0])[0])
    assert job.network_calls == 4
    card = job.card(4, 0)
    assert card["prompts"] == ["a red ring", "a blue square"]
    assert card["text_encoder"]["encoder_hash"]


def sample_one(run: Path, seed: int, words: str) -> torch.Tensor:
    model = load_model(run).eval()
    return to_uint8(sample(model, [seed], text=words, steps=2, guidance=2.0))[0]


def test_prompts_on_the_command_line(run, tmp_path, monkeypatch, capsys):
    (tmp_path / "prompts.txt").write_text("a red ring\n\na blue square\n")
    out = tmp_path / "out"
    words = [
        "--text",
        "a green circle",
        "--text",
        "a cyan ring",
        "--prompts",
        str(tmp_path / "prompts.txt"),
    ]
    monkeypatch.setattr(
        "sys.argv",
        ["mezzotint", "sample", str(run), "-o", str(out), "-n", "4", "--steps", "2", *words],
    )
    main()
    assert len(list(out.glob("*.png"))) == 4
    card = json.loads(next(out.glob("*.json")).read_text())
    assert card["prompts"] == ["a green circle", "a cyan ring", "a red ring", "a blue square"]


def test_prompts_without_text_conditioning_are_refused(run, t5, tmp_path):
    with pytest.raises(ValueError, match="2 prompts for 1 seeds"):
        sample(load_model(run).eval(), [0], text=["a", "b"], steps=1)
    with pytest.raises(ValueError, match="prompts"):
        sample(
            create_model("unet-tiny", size=16, num_classes=0).eval(),
            [0],
            text="a red ring",
            steps=1,
        )
    with pytest.raises(ValueError, match="give --text or --prompts"):
        make_job(run, {"guidance": Guidance(scale=2.0)})
    with pytest.raises(ValueError, match="not the one the model was trained with"):
        make_job(run, prompts=["a red ring"], encoder=str(saved_t5(tmp_path / "other", seed=1)))
