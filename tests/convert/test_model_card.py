"""Model cards publish no local path, and show strangers' names as they are written."""

from __future__ import annotations

import dataclasses
import json

import pytest
import yaml

import mezzotint as mz
from mezzotint import config
from mezzotint.convert import model_card
from mezzotint.evaluate.results import Evaluation, Number, Protocol
from mezzotint.recipes import recipe_for
from mezzotint.train.run_folder import run_lock

PRIVATE = "/home/alice/project-x"
NAMES = (
    "<script>alert(1)</script>",
    "![x](http://a.b/c.png)",
    "a\n# Licence: MIT\n",
    "\x1b]0;owned\x07\x1b[31m",
    "safe\u202egnp.exe",
    "a | b",
    "`code`",
    "---\nlicense: mit",
)


@pytest.fixture
def model():
    return mz.create_model(
        "unet-tiny", size=8, width=16, multipliers=(1,), blocks=(1,), attention=(False,),
        num_classes=len(NAMES),
    )  # fmt: skip


@pytest.fixture
def run(model, tmp_path, monkeypatch):
    monkeypatch.setattr(model_card, "save_sample_grid", lambda *args: "no grid")
    model.info = dataclasses.replace(
        model.info, labels=NAMES, licence="mit\n# x", codec=f"{PRIVATE}/vae"
    )
    folder = tmp_path / "runs" / "flowers"
    mz.save_model(model, folder / "model")
    recipe = config.override(
        recipe_for("unet-tiny"),
        [
            f"data.source='{PRIVATE}/flowers'",
            f"data.codec={PRIVATE}/codecs/vae",
            "data.text_encoder=alice/deep/t5",
            f"evaluate.reference={PRIVATE}/ref.npz",
            "evaluate.weights=secret/weights.pth",
            f"evaluate.prompts={PRIVATE}/prompts.txt",
        ],
    )
    (folder / "recipe.yaml").write_text(config.to_yaml(recipe))
    return folder


def card(run, *numbers, **protocol):
    values = {"source": f"{PRIVATE}/run", "num_images": 50, "code_version": "0.1", **protocol}
    evaluation = Evaluation(protocol=Protocol(**values), numbers=numbers)
    evaluation.save(run / "evaluation.json")
    text = (model_card.write_card(run) / "README.md").read_text(encoding="utf-8")
    _, header, body = text.split("---\n", 2)
    return yaml.safe_load(header), body


def number(**changes):
    values = {"metric": "FID", "value": 1.5, "features": {"name": "inception-2048", "hash": "a"}}
    return Number(**{**values, **changes})


@pytest.mark.parametrize(
    "reference",
    [
        {"name": f"{PRIVATE}/ref.npz", "hash": "b" * 16},
        {"name": "secret/ref.npz", "hash": "b" * 16},
        {"heldout": f"{PRIVATE}/ref.npz", "heldout_hash": "b" * 16},
        {"name": "C:\\Users\\alice\\ref.npz", "hash": "b" * 16},
    ],
)
def test_no_local_path_is_published(run, reference):
    features = {"name": f"{PRIVATE}/net.pth", "hash": "a"}
    protocol = {"prompts": f"8 of {PRIVATE}/prompts.txt", "sampler": "ddim"}
    header, body = card(run, number(reference=reference), number(features=features), **protocol)
    text = json.dumps(header) + body
    for secret in ("alice", "project-x", "secret", "home"):
        assert secret not in text
    (result,) = header["model-index"][0]["results"]
    assert result["dataset"] == {"name": "ref.npz", "type": "flowers"}
    for name in ("vae", "t5", "ref.npz", "weights.pth", "prompts.txt", "flowers", "net.pth"):
        assert name in body
    shown = yaml.safe_load(body.split("```yaml\n")[1].split("```")[0])
    assert shown["evaluate"]["reference"] == "ref.npz"
    assert shown["data"] | {"source": "", "codec": "vae", "text_encoder": "t5"} == shown["data"]


def test_names_of_the_hub_stay(run):
    recipe = config.override(recipe_for("unet-tiny"), ["data.codec=stabilityai/sd-vae-ft-mse"])
    assert "codec: stabilityai/sd-vae-ft-mse" in model_card.public_recipe(recipe)


def test_names_are_shown_as_they_are_written(run):
    evil = number(metric=NAMES[0], features={"name": NAMES[1]}, reference={"name": NAMES[2]})
    header, body = card(run, evil, sampler=NAMES[3], guidance=NAMES[5])
    for raw in (
        "<script>",
        "![x](",
        "\n# Licence: MIT",
        "\x1b",
        "\x07",
        "\u202e",
        " a | b",
        "\n# x",
    ):
        assert raw not in body
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in body
    assert "\\x1b\\]0;owned" in body
    assert header["license_name"] == "mit\\n# x"
    assert header["model-index"][0]["results"][0]["metrics"][0]["name"] == NAMES[0]
    rows = [line for line in body.splitlines() if line.startswith("| &lt;")]
    assert len(rows) == 1
    assert rows[0].replace("\\|", "").count("|") == 5


def test_the_readme_of_a_saved_model_is_escaped_too(run):
    text = (run / "model" / "README.md").read_text(encoding="utf-8")
    assert text.count("\n---\n") == 1
    for raw in ("<script>", "![x](", "\n# Licence: MIT", "\x1b", "\u202e", "alice"):
        assert raw not in text


def test_nothing_in_a_recipe_ends_its_code_block(run):
    recipe = config.override(recipe_for("unet-tiny"), ["data.text_encoder=x"])
    lines = model_card._training_section(recipe, [])
    block = lines[lines.index("<details><summary>The whole recipe</summary>") + 2 :]
    assert block[0] == "```yaml"
    assert block[2] == "```"


def test_the_images_of_others_stay(run):
    (run / "model" / "samples.png").write_bytes(b"precious")
    before = (run / "model" / "README.md").read_bytes()
    with pytest.raises(ValueError, match=r"samples.png exists and is not a grid of a card"):
        model_card.write_card(run)
    assert (run / "model" / "samples.png").read_bytes() == b"precious"
    assert (run / "model" / "README.md").read_bytes() == before
    (run / "samples").mkdir()
    (run / "samples" / "000000000064.png").write_bytes(b"precious")  # it is the run's own
    for _ in range(2):
        model_card.write_card(run)


def test_a_run_in_training_gets_no_card(run):
    before = (run / "model" / "README.md").read_bytes()
    with run_lock(run), pytest.raises(ValueError, match="another process is training"):
        model_card.write_card(run)
    assert (run / "model" / "README.md").read_bytes() == before
