"""The documents: every command parses, every Python block compiles, what is marked to run runs, links lead somewhere.

A fenced block after the line `<!-- run -->` is run, the blocks of one page in order in one fresh folder. A block after
`<!-- file: PATH -->` is a whole source file.
"""

from __future__ import annotations

import functools
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from mezzotint import cli

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"(?:<!-- (?P<mark>run|file: \S+) -->\n)?^```(?P<lang>\w*)[^\n]*\n(?P<text>.*?)^```$", re.M | re.S)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and what the comment above it says."""

    page: str
    lang: str
    text: str
    mark: str | None


def blocks(page):
    found = FENCE.finditer(page.read_text(encoding="utf-8"))
    return [Block(page.name, m["lang"], m["text"], m["mark"]) for m in found]


BLOCKS = [block for page in PAGES for block in blocks(page)]


def commands(block):
    """The words of every mezzotint command in a block that is no Python; comments and redirections are the shell's.

    `torchrun ... -m mezzotint.cli train ...` is one too.
    """
    if block.lang == "python":
        return []
    lines = block.text.replace("\\\n", " ").splitlines()
    found = []
    for line in lines:
        if not line.startswith(("mezzotint ", "torchrun ")):
            continue
        words = shlex.split(line, comments=True)
        if words[0] == "torchrun":
            words = ["mezzotint", *words[words.index("mezzotint.cli") + 1 :]]
        found.append(words[: words.index(">")] if ">" in words else words)
    return found


COMMANDS = [pytest.param(w, id=f"{b.page}-{' '.join(w)[:60]}") for b in BLOCKS for w in commands(b)]


def invoke(words, monkeypatch, functions):
    monkeypatch.setattr(cli, "COMMANDS", functions)
    monkeypatch.setattr(sys, "argv", words)
    cli.main()


@pytest.mark.parametrize("words", COMMANDS)
def test_every_command_parses(words, monkeypatch, capsys):
    called = []

    def stub(function):
        return functools.wraps(function)(lambda *args, **options: called.append(function.__name__))

    stubs = {name: stub(function) for name, function in cli.COMMANDS.items()}
    if any(w.startswith("--tyro-print-completion") or w in ("-h", "--help") for w in words):
        with pytest.raises(SystemExit) as left:
            invoke(words, monkeypatch, stubs)
        assert left.value.code in (None, 0)
        assert "mezzotint" in capsys.readouterr().out
        return
    invoke(words, monkeypatch, stubs)
    assert called == [words[1].replace("-", "_")]


def test_a_wrong_command_does_not_parse(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        invoke(["mezzotint", "train", "unet-tiny", "--dat", "digits"], monkeypatch, cli.COMMANDS)
    assert "--dat" in capsys.readouterr().err


def test_there_is_something_to_test():
    assert len(COMMANDS) > 40
    assert sum(b.lang == "python" for b in BLOCKS) > 5


@pytest.mark.parametrize(
    "block", [pytest.param(b, id=f"{b.page}-{i}") for i, b in enumerate(BLOCKS) if b.lang == "python"]
)
def test_every_python_block_compiles(block):
    compile(block.text, block.page, "exec")


RUN = sorted({b.page for b in BLOCKS if b.mark == "run"})


@pytest.mark.parametrize("page", RUN)
def test_what_is_marked_to_run_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in (b for b in BLOCKS if b.page == page and b.mark == "run"):
        if block.lang == "python":
            exec(compile(block.text, page, "exec"), names)
        for words in commands(block):
            invoke(words, monkeypatch, cli.COMMANDS)


def test_the_files_of_extending_work(tmp_path):
    """In a process of their own, so that no other test finds them registered."""
    files = [b.text for b in BLOCKS if b.mark and b.mark.startswith("file:")]
    assert len(files) == 3
    for i, text in enumerate(files):
        (tmp_path / f"example{i}.py").write_text(text)
    (tmp_path / "use.py").write_text(
        "import example0, example1, example2, torch\n"
        "import mezzotint as mz\n"
        "from mezzotint.models import build_model, preset_card\n"
        "from mezzotint.process import schedules\n"
        "from mezzotint.registry import Spec, build\n"
        "u = torch.tensor([0.01, 0.25, 0.5, 0.75, 0.99])\n"
        "l = build(schedules.registry, Spec('laplace', {'mean': 1.0}))(u)\n"
        "assert (l.diff() < 0).all() and l[2] == 1 and torch.allclose(l + l.flip(0), torch.tensor(2.0)), l\n"
        "torch.manual_seed(0)\n"
        "model = mz.create_model('mixer-tiny', size=16).eval().requires_grad_(False)\n"
        "model.backbone.head.weight.normal_(0, 0.02)\n"
        "best = mz.sample(model, [1, 2], label=3, sampler='ddim', steps=200)\n"
        "first, second = (mz.sample(model, [1, 2], label=3, sampler=s, steps=20) for s in ('ddim', 'midpoint'))\n"
        "assert (second - best).abs().max() < (first - best).abs().max() / 2\n"
        "mz.save_model(model, 'saved')\n"
        "assert mz.load_model('saved').card.preset == 'mixer-tiny'\n"
    )
    done = subprocess.run([sys.executable, "use.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_and_pictures_exist(page):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in LINK.findall(text):
        if "://" in target or target.startswith(("#", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        other = page.parent / path
        assert other.exists(), f"{page.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", other.read_text(encoding="utf-8"), re.M)
            slugs = {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}
            assert anchor in slugs, f"{page.name} links to {target}; {path} has {sorted(slugs)}"


def test_the_cost_table_is_of_this_version():
    """docs/make_tables.py writes it; three rows are counted again."""
    from mezzotint import info

    table = (ROOT / "docs" / "backbones.md").read_text(encoding="utf-8")
    for preset in ("unet-tiny", "dimr-tiny", "diffit-tiny"):
        counted = info.describe(preset)
        (row,) = [
            line for line in table.splitlines() if line.startswith(f"| `{preset}` | {counted['input_shape'][1]}x")
        ]
        assert info.si(counted["params"]) in row
        assert f"{counted['gmac']:.2f}" in row
