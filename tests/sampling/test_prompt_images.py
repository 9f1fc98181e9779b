"""Images of prompts: each a function of its own row, alone or beside others; what is recorded."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.text_model import save_text_model
from helpers.tiny_t5 import saved_t5
from mezzotint.cli import sampling as cli
from mezzotint.models import load_model
from mezzotint.sampling.job import make_job
from mezzotint.sampling.prompts import Prompt, read_prompts
from mezzotint.sampling.sample import sample
from mezzotint.sampling.settings import Guidance

pytest.importorskip("transformers")

ROWS = [
    {"text": "a red ring", "guidance": 1, "seed": 5},
    {"text": "a blue square", "negative": "red", "guidance": 4, "seed": 5},
    {"text": "a green circle at the top", "size": [16, 32], "seed": 9},
    {"text": "", "guidance": 0.5, "seed": 9},
    {"text": "a red\nring", "size": [16, 32], "negative": "blue", "guidance": 2.5, "seed": 1},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A model that reads a tiny T5, of 16 tokens at most."""
    t5 = saved_t5(tmp_path_factory.mktemp("t5"), seed=0)
    folder = tmp_path_factory.mktemp("model") / "model"
    save_text_model(folder, t5, str(t5))
    return folder


def write_rows(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run(model: Path, out: Path, file: Path, **options) -> None:
    settings = cli.SamplingOptions(prompts=file, steps=2, **options)
    cli.sample(str(model), out=out, sampling=settings)


HOW = [None, {"scale": 3.0}, {"scale": 2.0, "power": 4.0}, {"scale": 3.0, "low": -2, "high": 9}]


@pytest.mark.parametrize("how", HOW)
def test_an_image_is_the_same_alone_and_beside_others(model, how):
    changes = {"steps": 3} | ({} if how is None else {"guidance": Guidance(**how)})
    prompts = [Prompt(**{**row, "size": None}) for row in ROWS]
    together = make_job(model, changes, prompts=prompts)
    images = together.draw(range(len(prompts)))
    for prompt, image in zip(prompts, images, strict=True):
        alone = make_job(model, changes, prompts=[prompt])
        assert torch.equal(alone.draw([0])[0], image), prompt
    # A step before the guidance begins takes one call.
    assert together.network_calls == 6 - (how in HOW[2:])


def test_guidance_and_negative_text_act_on_their_own_image(model):
    def draw(**fields):
        job = make_job(model, {"steps": 2}, prompts=[Prompt(text="a red ring", seed=3, **fields)])
        return job.draw([0])

    plain = draw()
    assert torch.equal(draw(guidance=1.0), plain)
    assert not torch.equal(draw(guidance=5.0), plain)
    assert torch.equal(draw(guidance=5.0, negative=""), draw(guidance=5.0))
    assert not torch.equal(draw(guidance=5.0, negative="blue"), draw(guidance=5.0))
    # Away from its own words there is nothing to guide to.
    same = draw(guidance=5.0, negative="a red ring")
    assert (same.int() - plain.int()).abs().max() <= 1


def test_python_takes_a_scale_and_negative_words_per_image(model):
    net = load_model(model).eval()
    words = ["a red ring", "a blue square"]
    both = sample(net, [3, 4], text=words, steps=2, guidance=[2.0, 5.0], negative_text="green")
    for i, scale in enumerate((2.0, 5.0)):
        one = sample(net, 3 + i, text=words[i], steps=2, guidance=scale, negative_text="green")
        assert torch.equal(one[0], both[i])
    with pytest.raises(ValueError, match="3 guidance scales for 2 seeds"):
        sample(net, [3, 4], text=words, steps=2, guidance=[2.0, 5.0, 1.0])
    with pytest.raises(ValueError, match="acts through guidance"):
        sample(net, [3, 4], text=words, steps=2, negative_text="green")
    with pytest.warns(UserWarning, match="1 of 1 texts are cut to the 16 tokens"):
        sample(net, [3], text="red " * 40, steps=1)


def test_a_folder_records_what_was_used_and_makes_the_same_again(model, tmp_path, capsys):
    file = write_rows(tmp_path / "rows.jsonl", ROWS)
    run(model, tmp_path / "a", file, guidance="3", negative_text="cyan")
    assert "5 images, 4 network calls each" in capsys.readouterr().out
    rows = [json.loads(x) for x in (tmp_path / "a" / "metadata.jsonl").read_text().splitlines()]
    assert rows[0] == {
        "file_name": "000000.png", "text": "a red ring", "negative": "cyan", "seed": 5,
        "guidance": 1.0, "size": [16, 16],
    }  # fmt: skip
    assert rows[2] | {"guidance": 3.0, "negative": "cyan", "size": [16, 32]} == rows[2]
    card = json.loads((tmp_path / "a" / "card.json").read_text())
    assert card["size"] == "of each prompt"
    assert "a prompt's own seed" in card["seed_rule"]
    assert card["prompts"][1] == {
        "text": "a blue square", "negative": "red", "seed": 5, "guidance": 4.0
    }  # fmt: skip
    with Image.open(tmp_path / "a" / "000002.png") as image:
        assert image.size == (32, 16)
    run(model, tmp_path / "b", tmp_path / "a" / "metadata.jsonl")
    run(model, tmp_path / "c.tar", file, guidance="3", negative_text="cyan", batch=2)
    with tarfile.open(tmp_path / "c.tar") as archive:
        for i in range(len(ROWS)):
            name = f"{i:06d}.png"
            first = np.asarray(Image.open(tmp_path / "a" / name))
            assert np.array_equal(first, np.asarray(Image.open(tmp_path / "b" / name)))
            member = archive.extractfile(f"{i:09d}.png")
            assert member is not None
            assert np.array_equal(first, np.asarray(Image.open(member)))
    assert read_prompts(tmp_path / "b" / "metadata.jsonl") == read_prompts(
        tmp_path / "a" / "metadata.jsonl"
    )


def test_a_seed_grows_when_the_prompts_come_round_again(model):
    job = make_job(model, {"steps": 1}, prompts=[Prompt(text="a", seed=7), Prompt(text="b")])
    assert job.noise_seeds([0, 1, 2, 3, 4]) == [7, 1, 8, 3, 9]


@pytest.mark.parametrize(
    ("rows", "options", "out", "message"),
    [
        ([{"text": "a", "negative": "b"}], {}, "o", "negative text 'b' acts through guidance"),
        ([{"text": "a"}], {"negative_text": "b"}, "o", "acts through guidance"),
        (ROWS, {}, "o.npz", r"several sizes \(16x16, 16x32\) do not fit in .*\.npz"),
        (ROWS, {}, "o.png", "several sizes"),
        ([{"text": "a", "size": 9}], {}, "o", "multiples of 16"),
        ([{"text": "a"}, {"text": 3}], {}, "o", r"rows\.jsonl, line 2: it has no field 'text'"),
    ],
)
def test_what_cannot_be_made_is_refused_before_any_file(
    model, tmp_path, rows, options, out, message
):
    file = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ValueError, match=message):
        run(model, tmp_path / out, file, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_negative_words_need_prompts_and_no_guide_model(model):
    with pytest.raises(ValueError, match="needs prompts"):
        make_job(model, negative_text="red")
    guidance = {"guidance": Guidance(scale=2.0)}
    with pytest.raises(ValueError, match="guide model takes the place"):
        make_job(model, guidance, prompts=["a"], negative_text="red", guide_model=model)


def test_what_is_not_read_is_said_once(model, tmp_path, capsys):
    words = ("a (red:1.5) ring", "blue " * 30, "红 " * 20)
    options = cli.SamplingOptions(text=words, steps=1)
    cli.sample(str(model), out=tmp_path / "o", num_images=6, sampling=options)
    lines = capsys.readouterr().out.splitlines()
    cut = [line for line in lines if "cut" in line]
    assert len(cut) == 1
    assert cut[0].startswith("2 of 3 texts are cut to the 16 tokens that the model reads; 'blue ")
    assert cut[0].endswith("has 31")
    assert sum("weights in parentheses are read as words" in line for line in lines) == 1
