"""benchmarks/openclipart.py: captions, held-out authors, hostile files, the judge."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from helpers.tiny_t5 import saved_t5

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SVG = """<?xml version="1.0"?>{doctype}
<svg xmlns="http://www.w3.org/2000/svg" width="100" height="50"><metadata>
<rdf:RDF xmlns:cc="http://web.resource.org/cc/" xmlns:dc="http://purl.org/dc/elements/1.1/"
 xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><cc:Work><dc:title>{title}</dc:title>
<dc:subject><rdf:Bag>{keywords}</rdf:Bag></dc:subject>
<dc:publisher><cc:Agent><dc:title>Open Clip Art Library</dc:title></cc:Agent></dc:publisher>
<dc:creator><cc:Agent><dc:title>{author}</dc:title></cc:Agent></dc:creator>
</cc:Work></rdf:RDF></metadata><rect x="10" width="{width}" height="20" fill="#ff0000"/></svg>"""


def benchmark(name: str, monkeypatch):
    if not (BENCHMARKS / f"{name}.py").exists():
        pytest.skip("benchmarks are not part of the source distribution")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module(name)
    sys.modules.pop(name, None)


@pytest.fixture
def drawings(monkeypatch):
    yield from benchmark("clipart_drawings", monkeypatch)


@pytest.fixture
def contrastive(monkeypatch):
    yield from benchmark("contrastive", monkeypatch)


def write_svg(path: Path, title="Red Box", keywords=("toys", "box"), author="Ann Lee", **other):
    path.parent.mkdir(parents=True, exist_ok=True)
    listed = "".join(f"<rdf:li>{word}</rdf:li>" for word in keywords)
    values = {"doctype": "", "width": 40, **other}
    path.write_text(SVG.format(title=title, keywords=listed, author=author, **values))
    return path


@pytest.mark.parametrize(
    ("title", "keywords", "name", "is_collection", "caption"),
    [
        ("Red Box 01", ("toys", "box"), "x.svg", False, "red box, toys"),
        ("RedBox", ("unsorted", "red box"), "x.svg", False, "red box"),
        ("clipart by Ann Lee", ("food",), "coffee_mug_ann_le_01.svg", False, "coffee mug, food"),
        ("Ann's cards", ("card",), "queen_of_hearts.svg", True, "queen of hearts, card"),
        ("", ("Fruits et légumes",), "12.svg", False, "fruits et légumes"),
        ("untitled", ("unsorted",), "1.svg", False, ""),
    ],
)
def test_captions_are_the_title_and_the_keywords_that_are_new(
    drawings, title, keywords, name, is_collection, caption
):
    data = drawings.Metadata(title, keywords, "Ann Lee")
    assert drawings.make_caption(data, name, is_collection) == caption


def test_metadata_are_of_the_work_not_of_its_publisher(drawings, tmp_path):
    data = drawings.read_metadata(write_svg(tmp_path / "a.svg"))
    assert data == drawings.Metadata("Red Box", ("toys", "box"), "Ann Lee")


def test_hostile_and_broken_files_are_refused(drawings, tmp_path):
    (tmp_path / "secret").write_text("secret")
    outside = f'<!DOCTYPE svg [<!ENTITY t SYSTEM "{(tmp_path / "secret").as_uri()}">]>'
    path = write_svg(tmp_path / "outside.svg", title="&t;", doctype=outside)
    with pytest.raises(ValueError, match="no XML"):
        drawings.read_metadata(path)
    levels = "".join(f'<!ENTITY e{i} "{f"&e{i - 1};" * 10}">' for i in range(1, 12))
    bomb = f'<!DOCTYPE svg [<!ENTITY e0 "{"x" * 10}">{levels}]>'
    path = write_svg(tmp_path / "bomb.svg", title="&e11;", doctype=bomb)
    with pytest.raises(ValueError, match="no XML"):
        drawings.read_metadata(path)
    (tmp_path / "cut.svg").write_text(SVG[:300])
    with pytest.raises(ValueError, match="no XML"):
        drawings.read_metadata(tmp_path / "cut.svg")


def test_stars_icons_copies_and_broken_files_are_left_out_and_counted(drawings, tmp_path):
    write_svg(tmp_path / "svg/animals/cat.svg", title="cat")
    write_svg(tmp_path / "svg/animals/same.svg", title="cat")
    write_svg(tmp_path / "svg/shapes/stars/1.svg", title="gramastar")
    write_svg(tmp_path / "svg/computer/icons/flat/2.svg", title="disk")
    write_svg(tmp_path / "svg/food/pie.svg", title="pie", author="unknown")
    (tmp_path / "svg/food/broken.svg").write_text("<svg")
    found, left_out = drawings.find_drawings(tmp_path)
    assert [(d.name, d.group) for d in found] == [
        ("animals/cat.svg", "author ann lee"),
        ("food/pie.svg", "folder food"),
    ]
    assert left_out == {"star or icon": 2, "same file twice": 1, "broken file": 1}
    with pytest.raises(ValueError, match="apt-get download openclipart-svg"):
        drawings.find_drawings(tmp_path / "svg" / "food")


def test_groups_are_held_out_whole_and_by_the_seed(drawings):
    groups = [f"author {i // 5}" for i in range(500)] + ["author big"] * 200
    chosen = drawings.held_out_groups(groups, 0.1, seed=0)
    assert chosen == drawings.held_out_groups(groups[::-1], 0.1, seed=0)
    assert chosen != drawings.held_out_groups(groups, 0.1, seed=1)
    assert 70 <= sum(group in chosen for group in groups) < 75
    assert "author big" not in chosen


@pytest.mark.skipif(shutil.which("rsvg-convert") is None, reason="rsvg-convert is not installed")
def test_drawings_are_trimmed_centred_and_written_with_their_captions(drawings, tmp_path):
    write_svg(tmp_path / "svg/animals/cat.svg", title="cat")
    write_svg(tmp_path / "svg/animals/wide.svg", title="dog", author="Bo", width=80)
    write_svg(tmp_path / "svg/animals/none.svg", title="no", width=0)
    image = drawings.render(tmp_path / "svg/animals/cat.svg", 64)
    assert image.size == (64, 64)
    assert image.getpixel((1, 32)) == (255, 255, 255)
    assert image.getpixel((32, 32)) == (255, 0, 0)
    assert image.getpixel((32, 8)) == (255, 255, 255)  # twice as wide as high
    counts = drawings.write_drawings(tmp_path, tmp_path / "out", 64, share=0.5)
    assert counts["left_out"] == {"cannot be drawn": 1}
    rows = [
        {**json.loads(line), "part": part}
        for part in ("train", "test")
        for line in (tmp_path / "out" / part / "metadata.jsonl").read_text().splitlines()
    ]
    assert sorted(row["text"] for row in rows) == ["cat, toys, box", "dog, toys, box"]
    for row in rows:
        with Image.open(tmp_path / "out" / row["part"] / row["file_name"]) as image:
            assert image.size == (64, 64)


def test_ranks_count_the_captions_that_fit_at_least_as_well(contrastive):
    class Judge:
        def images(self, pixels):
            return torch.eye(4)[pixels]

        def captions(self, captions):
            assert captions == ["a", "b", "c"]
            return torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0.5, 0, 1, 0]])

    ranks = contrastive.retrieval_ranks(
        Judge(), torch.tensor([0, 1, 0, 3]), ["a", "b", "c", "a"], among=3, seed=0
    )
    assert ranks.tolist() == [0, 0, 1, 2]  # the last fits nothing, and so nothing fits it less
    with pytest.raises(ValueError, match="3 different captions"):
        contrastive.retrieval_ranks(Judge(), torch.zeros(3), ["a", "b", "c"], among=4, seed=0)


def test_the_contrastive_loss_shares_the_target_among_equal_captions(contrastive):
    x = torch.eye(2)
    apart = contrastive.contrastive_loss(x, x, torch.tensor(0.0), torch.eye(2))
    assert apart == pytest.approx(torch.log(1 + torch.exp(torch.tensor(-1.0))).item())
    alike = contrastive.contrastive_loss(x, x, torch.tensor(0.0), torch.ones(2, 2))
    assert alike == pytest.approx(apart.item() + 0.5)


def test_a_saved_judge_answers_as_before(contrastive, tmp_path):
    encoder = saved_t5(tmp_path / "t5", seed=0)
    contrastive.WIDTH = 16
    torch.manual_seed(0)
    judge = contrastive.Scorer(encoder, contrastive.ImageTower(), contrastive.TextTower())
    contrastive.save_scorer(judge, tmp_path / "judge")
    again = contrastive.load_scorer(encoder, tmp_path / "judge")
    pixels = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(judge.images(pixels), again.images(pixels))
    captions = ["a red ring", "a green square"]
    assert torch.equal(judge.captions(captions), again.captions(captions))
    assert judge.captions(captions).norm(dim=1) == pytest.approx(torch.ones(2))
