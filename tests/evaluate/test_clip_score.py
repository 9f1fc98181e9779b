"""CLIP scores: transformers' own numbers, the same for any batch and ranks, errors that help."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.tiny_clip import SIZE, saved_clip
from mezzotint.evaluate import clip as clips
from mezzotint.evaluate import extract
from mezzotint.evaluate.clip import Preprocessing, open_clip
from mezzotint.evaluate.clip_score import clip_score, embed_captions
from mezzotint.evaluate.evaluate import evaluate
from mezzotint.evaluate.image_source import (
    caption_images,
    from_folder,
    from_samples,
    open_image_source,
)
from mezzotint.evaluate.results import compare

N = 70
CAPTIONS = [
    f"a {colour} {shape} at the {place}"
    for colour in ("red", "green", "blue", "cyan")
    for shape in ("circle", "square", "ring")
    for place in ("top", "left", "right")
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved_clip(tmp_path_factory.mktemp("models") / "tiny-clip")


@pytest.fixture(scope="module")
def clip(folder):
    return open_clip(str(folder))


def images(height=20, width=20):
    generator = torch.Generator().manual_seed(0)
    colours = torch.randint(0, 200, (N, 3, 1, 1), generator=generator)
    grain = torch.randint(0, 56, (N, 3, height, width), generator=generator)
    return (colours + grain).to(torch.uint8)


def source(batch=10, drawn=None, **options):
    pixels = images()

    def draw(indices):
        if drawn is not None:
            drawn.append(indices)
        return pixels[list(indices)]

    made = from_samples(draw, N, "images", {}, identity="0", batch=batch, **options)
    return caption_images(made, [CAPTIONS[i % len(CAPTIONS)] for i in range(N)])


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(extract, "MAX_PIECE_IMAGES", 32)


def numbers(evaluation):
    return {n.metric: (n.value, n.error) for n in evaluation.numbers}


def test_both_scores_are_those_of_transformers(folder, clip):
    """Image by image and caption by caption, with transformers' own processor and model."""
    import transformers

    model = transformers.CLIPModel.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    processor = transformers.AutoImageProcessor.from_pretrained(folder, use_fast=False)
    cosines = {"": [], "A photo depicts ": []}
    for i, pixels in enumerate(images().permute(0, 2, 3, 1).numpy()):
        for prefix, values in cosines.items():
            caption = prefix + CAPTIONS[i % len(CAPTIONS)]
            words = tokenizer(caption, return_tensors="pt", truncation=True, max_length=8)
            seen = processor(images=Image.fromarray(pixels), return_tensors="pt")
            with torch.no_grad():
                out = model(**words, pixel_values=seen["pixel_values"])
            cosine = torch.cosine_similarity(out.text_embeds, out.image_embeds)
            values.append(float(cosine))
    found = clip_score(source(), clip)
    plain, prefixed = (np.array(v) for v in cosines.values())
    assert prefixed.min() < 0 < prefixed.max()
    expected = {"CLIP score": 100 * plain, "CLIPScore": 2.5 * prefixed.clip(0)}
    for metric, values in expected.items():
        number = found[f"{metric} (tiny-clip)"]
        assert number.value == pytest.approx(values.mean(), rel=1e-4, abs=1e-5)
        assert number.error == pytest.approx(values.std(ddof=1) / math.sqrt(N), rel=1e-4)
    assert found["CLIP score (tiny-clip)"].reference["num_captions"] == len(CAPTIONS)


@pytest.mark.parametrize(("height", "width"), [(224, 224), (300, 301), (97, 64), (64, 97)])
def test_images_are_prepared_as_by_transformers(height, width):
    import transformers

    processor = transformers.CLIPImageProcessorPil()
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (2, 3, height, width), generator=generator, dtype=torch.uint8)
    ours = Preprocessing(size=224, crop=224)(pixels)
    theirs = processor(
        images=[Image.fromarray(p) for p in pixels.permute(0, 2, 3, 1).numpy()], return_tensors="pt"
    )["pixel_values"]
    assert ours.shape == theirs.shape
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_published_preprocessing_is_the_default(tmp_path):
    assert clips.read_preprocessing(tmp_path, 224) == Preprocessing(size=224, crop=224)
    # Older files have numbers in place of sizes.
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": 224, "crop_size": 224}))
    assert clips.read_preprocessing(tmp_path, 224) == Preprocessing(size=224, crop=224)


@pytest.mark.parametrize(
    "values",
    [
        {"resample": 2},
        {"do_center_crop": False},
        {"crop_size": {"height": 8, "width": 16}},
        {"size": {"height": 16, "width": 16}},
        {"crop_size": 32},
    ],
)
def test_another_preprocessing_is_refused(values, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="another preprocessing"):
        clips.read_preprocessing(tmp_path, 16)


@pytest.mark.parametrize("batch", [1, 7, 70])
def test_the_batch_does_not_matter(batch, clip):
    assert numbers(clip_score(source(batch), clip)) == numbers(clip_score(source(), clip))


def test_a_caption_is_embedded_alone(clip):
    alone = torch.cat([clip.embed([caption]) for caption in CAPTIONS])
    assert torch.equal(clip.embed(CAPTIONS), alone)
    assert torch.allclose(alone.norm(dim=1), torch.ones(len(CAPTIONS)))


def test_long_captions_are_cut_and_counted(clip):
    long = "a red circle at the top left of the square"
    assert clip.is_cut(long)
    assert not clip.is_cut(CAPTIONS[0])
    scored = clip_score(
        dataclasses.replace(source(), captions=(long, *source().captions[1:])), clip
    )
    assert scored.numbers[0].reference["cut"] == 1


def test_an_interrupted_evaluation_resumes(clip, small_pieces, tmp_path):
    class Stopped(Exception):
        pass

    class Stopping(list):
        def append(self, indices):
            super().append(indices)
            if len(self) == 7:
                raise Stopped

    with pytest.raises(Stopped):
        clip_score(source(drawn=Stopping()), clip, folder=tmp_path)
    drawn = []
    resumed = clip_score(source(drawn=drawn), clip, folder=tmp_path)
    # The first two images give the resolution; then only the last two pieces are drawn.
    assert [r.start for r in drawn] == [0, 32, 42, 52, 62, 64]
    assert numbers(resumed) == numbers(clip_score(source(), clip))


def test_ranks_share_the_work_and_give_the_numbers_of_one(
    clip, small_pieces, tmp_path, monkeypatch
):
    """One rank after the other, with the pieces of both in one folder."""
    expected = numbers(clip_score(source(), clip))
    monkeypatch.setattr(extract, "get_world_size", lambda: 2)
    monkeypatch.setattr(extract, "get_rank", lambda: 1)
    assert embed_captions(clip, source().captions, tmp_path) is None
    drawn = []
    extract.extract_features(source(drawn=drawn), [clip.features], tmp_path)
    assert {r.start for r in drawn} == {32, 42, 52, 62}
    monkeypatch.setattr(extract, "get_rank", lambda: 0)
    drawn.clear()
    assert numbers(clip_score(source(drawn=drawn), clip, folder=tmp_path)) == expected
    assert {r.start for r in drawn} == {0, 10, 20, 30, 64}


def test_captions_of_another_order_are_not_comparable(clip):
    first = clip_score(source(), clip)
    turned = caption_images(source(), source().captions[::-1])
    conflicts = compare(first, clip_score(turned, clip)).conflicts
    assert set(conflicts) == {
        "CLIP score (tiny-clip): reference",
        "CLIPScore (tiny-clip): reference",
    }
    assert not compare(first, clip_score(source(7), clip)).conflicts


def test_images_and_captions_that_do_not_fit(clip):
    with pytest.raises(ValueError, match="no captions"):
        clip_score(dataclasses.replace(source(), captions=None), clip)
    with pytest.raises(ValueError, match="3 captions for 70 images"):
        caption_images(source(), ["a ring"] * 3)
    with pytest.raises(ValueError, match="need one"):
        evaluate(source(), None, [clip.features], clips=[clip])


def test_samples_bring_their_prompts(tmp_path, clip):
    """A folder or file of `mezzotint sample` has a card with its prompts and seeds."""
    pixels = images()[:4].permute(0, 2, 3, 1).numpy()
    card = {
        "mezzotint_samples": 1, "first_seed": 1, "num_images": 4,
        "prompts": ["red", {"text": "blue", "guidance": 2.0}],
        "discretization": "own", "model": {"training_images": 0}, "label_order": None,
        "sampler": {"name": "ddim"}, "steps": 5, "network_calls_per_image": 5, "guidance": None,
        "uint8_rule": "round", "dtype": "float32",
    }  # fmt: skip
    np.savez(tmp_path / "samples.npz", arr_0=pixels)
    (tmp_path / "samples.npz.json").write_text(json.dumps(card))
    found = open_image_source(tmp_path / "samples.npz")
    assert found.captions == ("blue", "red", "blue", "red")
    assert clip_score(found, clip).protocol.prompts.startswith("2 in turn")
    (tmp_path / "set").mkdir()
    for i, image in enumerate(pixels[:3]):
        Image.fromarray(image).save(tmp_path / "set" / f"{i}.png")
    (tmp_path / "set" / "card.json").write_text(json.dumps(card))
    assert from_folder(tmp_path / "set").captions is None  # one is missing: which is unknown


def test_the_papers_network_alone_has_the_bare_name(clip):
    of_paper = dataclasses.replace(clip, is_vit_l14=True)
    assert [n.metric for n in clip_score(source(), of_paper).numbers] == ["CLIP score", "CLIPScore"]
    assert not clip.is_vit_l14
    assert clip.features.input.startswith(f"shorter side to {SIZE} px")


def test_a_missing_model_says_where_it_belongs(tmp_path, monkeypatch):
    import huggingface_hub

    asked = {}

    def download(repo, **options):
        asked.update(options)
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setenv("MEZZOTINT_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="no network") as caught:
        open_clip()
    assert asked["revision"] == clips.REVISIONS[clips.VIT_L14]
    for part in (clips.VIT_L14, asked["revision"], str(tmp_path / "clip" / clips.VIT_L14)):
        assert part in str(caught.value)
    with pytest.raises(ValueError, match="neither a folder nor OWNER/NAME"):
        open_clip("no such folder")


def test_damaged_and_foreign_folders(tmp_path, folder, monkeypatch):
    from safetensors.torch import load_file, save_file

    # In the place of the published model another one would give other numbers.
    monkeypatch.setenv("MEZZOTINT_CACHE", str(tmp_path / "cache"))
    shutil.copytree(folder, tmp_path / "cache" / "clip" / clips.VIT_L14)
    with pytest.raises(ValueError, match="not the published one"):
        open_clip()
    shutil.copytree(folder, tmp_path / "partial")
    weights = load_file(folder / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, tmp_path / "partial" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lack 1 tensors, first visual_projection\.weight"):
        open_clip(str(tmp_path / "partial"))
    (tmp_path / "partial" / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(ValueError, match="'t5' model"):
        open_clip(str(tmp_path / "partial"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"config\.json does not exist"):
        open_clip(str(tmp_path / "empty"))
