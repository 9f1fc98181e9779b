"""The documents: every command parses, every Python block compiles, what is marked to run runs, links lead somewhere.

Commands are those of fenced blocks and those in the text between single backquotes.

A fenced block after the line `<!-- run -->` is run, the blocks of one page in order in one fresh folder. A block after
`<!-- file: PATH -->` is a whole source file.
"""

from __future__ import annotations

import functools
import re
import runpy
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest

import mezzotint as mz
from mezzotint import __version__, cli
from mezzotint.web.studio import Limits

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(
    r"(?:<!-- (?P<mark>run|file: \S+) -->\n)?^```(?P<lang>\w*)[^\n]*\n(?P<text>.*?)^```$",
    re.M | re.S,
)
MAKEFILE = (ROOT / "Makefile").read_text()
LINK = re.compile(r"\]\(([^)\s]+)(?: \"[^\"]*\")?\)|^\[[^\]]+\]: (\S+)$", re.M)


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


def lines_of(block):
    """The lines of a block that is no Python, those that a backslash continues joined."""
    return [] if block.lang == "python" else block.text.replace("\\\n", " ").splitlines()


def words_of(line):
    """The words of a mezzotint command, None of anything else; comments and redirections are the shell's.

    `torchrun ... -m mezzotint train ...` is one too, and so is one that a script of SLURM ends in.
    """
    if task := re.search(r"exec (mezzotint [^']*)'", line):
        line = task[1]
    if not line.startswith(("mezzotint ", "torchrun ", "accelerate launch ")):
        return None
    words = shlex.split(line, comments=True)
    if words[0] != "mezzotint":
        words = ["mezzotint", *words[words.index("mezzotint") + 1 :]]
    return words[: words.index(">")] if ">" in words else words


def commands(block):
    """The words of every mezzotint command of a block."""
    return [words for line in lines_of(block) if (words := words_of(line))]


def mentions(page):
    """What stands between single backquotes, outside fenced blocks."""
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", page.read_text(encoding="utf-8")))


MENTIONS = [(page, text) for page in PAGES for text in mentions(page)]
# An ellipsis stands for whatever else belongs there.
MENTIONED = [
    (p.name, words)
    for p, text in MENTIONS
    if "..." not in text and len(words := words_of(text) or ()) > 2
]
COMMANDS = [
    pytest.param(words, id=f"{page}-{' '.join(words)[:60]}")
    for page, words in [*((b.page, w) for b in BLOCKS for w in commands(b)), *MENTIONED]
]


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
        said = capsys.readouterr().out
        assert "--help" in words or all(name in said for name in cli.COMMANDS), (
            "not every command is completed"
        )
        assert "mezzotint" in said
        return
    invoke(words, monkeypatch, stubs)
    assert called == [words[1].replace("-", "_")]


def test_a_wrong_command_does_not_parse(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        invoke(["mezzotint", "train", "unet-tiny", "--dat", "digits"], monkeypatch, cli.COMMANDS)
    assert "--dat" in capsys.readouterr().err


def test_the_version_is_printed(monkeypatch, capsys):
    invoke(["mezzotint", "--version"], monkeypatch, cli.COMMANDS)
    assert capsys.readouterr().out == f"mezzotint {__version__}\n"


@pytest.mark.parametrize("words", [["info", "--json"], ["--version"]])
def test_a_reader_that_has_seen_enough_is_no_error(words):
    """As `mezzotint info --json | head -1`: nothing on stderr, whenever the pipe closes."""
    command = [sys.executable, "-m", "mezzotint", *words]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as started:
        assert started.stdout is not None
        assert started.stderr is not None
        started.stdout.close()
        assert started.stderr.read() == ""


def test_the_page_of_troubles_lists_the_samplers():
    from mezzotint.process import samplers

    said = " ".join((ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8").split())
    assert (
        f"The samplers of `--sampler` are {', '.join(f'`{name}`' for name in samplers.registry)}."
        in said
    )


def test_the_names_that_the_reference_promises_are_there():
    said = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert {"__version__", *re.findall(r"`mz\.(\w+)`", said)} == set(mz.__all__)
    assert all(getattr(mz, name) is not None for name in mz.__all__)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_command_that_is_mentioned_exists(page):
    for text in mentions(page):
        if found := re.match(r"mezzotint ([a-z][\w-]*)", text):
            assert found[1] in cli.COMMANDS, text
        if found := re.match(r"make ([a-z][\w-]*)$", text):
            assert re.search(rf"^{found[1]}:", MAKEFILE, re.M), text


def test_every_target_of_make_in_a_block_exists():
    found = [
        m[1] for b in BLOCKS for line in lines_of(b) if (m := re.match(r"make ([\w-]+)", line))
    ]
    assert found
    assert all(re.search(rf"^{name}:", MAKEFILE, re.M) for name in found)


def scripts():
    """The words of every command that runs one of the repository's Python files."""
    lines = [*(line for b in BLOCKS for line in lines_of(b)), *(text for _, text in MENTIONS)]
    starting = [m[1] for line in lines if (m := re.match(r"(?:# )?python (\w\S*\.py.*)", line))]
    return sorted({tuple(shlex.split(line, comments=True)) for line in starting})


SCRIPTS = scripts()


@pytest.mark.parametrize("words", SCRIPTS, ids=" ".join)
def test_every_script_knows_its_options(words):
    script = ROOT / words[0]
    assert script.is_file()
    options = [w for w in words[1:] if w.startswith("--")]
    if options:
        said = subprocess.run(
            [sys.executable, script, "--help"], capture_output=True, text=True, check=True, cwd=ROOT
        )
        assert all(re.search(rf"{option}\b", said.stdout) for option in options), said.stdout


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.lang == "bash"], ids=lambda b: b.page)
def test_every_shell_script_parses(block):
    subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)


PLACES = [ROOT, ROOT / "src" / "mezzotint", ROOT / "docs"]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_source_file_that_is_named_exists(page):
    written_there = {b.mark.removeprefix("file: ") for b in BLOCKS if b.mark}
    for text in set(mentions(page)) - written_there:
        if re.fullmatch(r"[\w./-]+\.(py|ipynb|sh)|(benchmarks|tests|docs|src)/[\w./-]*", text):
            assert any((place / text).exists() for place in PLACES), f"{page.name} names {text}"


def test_there_is_something_to_test():
    assert len(MENTIONED) > 10
    assert len(SCRIPTS) > 3
    assert len(COMMANDS) > 40
    assert sum(b.lang == "python" for b in BLOCKS) > 5


@pytest.mark.parametrize(
    "block",
    [pytest.param(b, id=f"{b.page}-{i}") for i, b in enumerate(BLOCKS) if b.lang == "python"],
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
        "assert mz.load_model('saved').info.preset == 'mixer-tiny'\n"
    )
    done = subprocess.run([sys.executable, "use.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_and_pictures_exist(page):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in (found[1] or found[2] for found in LINK.finditer(text)):
        if (
            "://" in target
        ):  # the suite has no network; that it is an address is all there is to see
            address = urlsplit(target)
            assert address.scheme == "https", f"{page.name} links to {target}"
            assert re.fullmatch(r"[\w-]+(\.[\w-]+)+", address.netloc), (
                f"{page.name} links to {target}"
            )
            continue
        path, _, anchor = target.partition("#")
        other = page.parent / path if path else page
        assert other.exists(), f"{page.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", other.read_text(encoding="utf-8"), re.M)
            slugs = {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}
            assert anchor in slugs, f"{page.name} links to {target}; {path} has {sorted(slugs)}"


def test_the_speed_table_is_of_the_newest_results():
    """Where it fails: python docs/make_tables.py."""
    written = runpy.run_path(str(ROOT / "docs" / "make_tables.py"))["speed"]()
    assert written in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_studio_page_states_its_limits():
    limits, said = Limits(), (ROOT / "docs" / "studio.md").read_text(encoding="utf-8")
    seconds = f"{limits.seconds / 60:g} minutes of computing"
    for words in (
        f"{limits.pictures} pictures",
        f"{limits.steps} steps",
        seconds,
        f"{limits.words:,} characters",
    ):
        assert words in " ".join(said.split())


def test_the_cost_table_is_of_this_version():
    """docs/make_tables.py writes it; three rows are counted again."""
    from mezzotint.tools import summary

    table = (ROOT / "docs" / "backbones.md").read_text(encoding="utf-8")
    for preset in ("unet-tiny", "dimr-tiny", "diffit-tiny"):
        counted = summary.describe(preset)
        (row,) = [
            line
            for line in table.splitlines()
            if line.startswith(f"| `{preset}` | {counted['input_shape'][1]}x")
        ]
        assert summary.si(counted["params"]) in row
        assert f"{counted['gmac']:.2f}" in row
