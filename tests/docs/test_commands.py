"""README and docs/: commands parse, Python compiles, marked blocks run, links resolve.

Commands are taken from fenced blocks and from inline code.

A fenced block after the line `<!-- run -->` runs; the blocks of one page run in order in one empty
folder. A block after `<!-- file: PATH -->` is a complete source file.
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
from mezzotint.tools.count import count_preset
from mezzotint.tools.summary import format_count
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
    """A fenced block: its page, language and text, and the mark in the comment above it."""

    page: str
    lang: str
    text: str
    mark: str | None


def read_blocks(page):
    matches = FENCE.finditer(page.read_text(encoding="utf-8"))
    return [Block(page.name, m["lang"], m["text"], m["mark"]) for m in matches]


BLOCKS = [block for page in PAGES for block in read_blocks(page)]


def shell_lines(block):
    """Return the lines of a block that is not Python, with continued lines joined."""
    return [] if block.lang == "python" else block.text.replace("\\\n", " ").splitlines()


def split_command(line):
    """Return the arguments of a mezzotint command, or None for any other line.

    This includes `torchrun ... -m mezzotint train ...`. Shell comments and redirections are
    dropped.
    """
    if not line.startswith(("mezzotint ", "torchrun ", "accelerate launch ")):
        return None
    args = shlex.split(line, comments=True)
    if args[0] != "mezzotint":
        args = ["mezzotint", *args[args.index("mezzotint") + 1 :]]
    return args[: args.index(">")] if ">" in args else args


def read_commands(block):
    """Return the arguments of every mezzotint command in a block."""
    return [args for line in shell_lines(block) if (args := split_command(line))]


def inline_code(page):
    """Return all text between single backquotes outside fenced blocks."""
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", page.read_text(encoding="utf-8")))


INLINE = [(page, text) for page in PAGES for text in inline_code(page)]
# Skip commands that are abbreviated with an ellipsis, and those without arguments.
INLINE_COMMANDS = [
    (page.name, args)
    for page, text in INLINE
    if "..." not in text and len(args := split_command(text) or ()) > 2
]
BLOCK_COMMANDS = [(block.page, args) for block in BLOCKS for args in read_commands(block)]
COMMANDS = [
    pytest.param(args, id=f"{page}-{' '.join(args)[:60]}")
    for page, args in [*BLOCK_COMMANDS, *INLINE_COMMANDS]
]


def run_cli(args, monkeypatch, functions):
    monkeypatch.setattr(cli, "COMMANDS", functions)
    monkeypatch.setattr(sys, "argv", args)
    cli.main()


@pytest.mark.parametrize("args", COMMANDS)
def test_every_command_parses(args, monkeypatch, capsys):
    called = []

    def record(name, function):
        return functools.wraps(function)(lambda *args, **options: called.append(name))

    stubs = {name: record(name, function) for name, function in cli.COMMANDS.items()}
    if any(a.startswith("--tyro-print-completion") or a in ("-h", "--help") for a in args):
        with pytest.raises(SystemExit) as exited:
            run_cli(args, monkeypatch, stubs)
        assert exited.value.code in (None, 0)
        printed = capsys.readouterr().out
        assert "mezzotint" in printed
        if "--help" not in args:
            missing = [name for name in cli.COMMANDS if name not in printed]
            assert not missing, f"no completion for {missing}"
        return
    run_cli(args, monkeypatch, stubs)
    assert called == [args[1]]


def test_a_misspelt_option_is_rejected(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run_cli(["mezzotint", "train", "unet-tiny", "--dat", "digits"], monkeypatch, cli.COMMANDS)
    assert "--dat" in capsys.readouterr().err


def test_version(monkeypatch, capsys):
    run_cli(["mezzotint", "--version"], monkeypatch, cli.COMMANDS)
    assert capsys.readouterr().out == f"mezzotint {__version__}\n"


@pytest.mark.parametrize("args", [["info", "--json"], ["--version"]])
def test_a_closed_pipe_prints_no_error(args):
    """As in `mezzotint info --json | head -1`: stderr stays empty whenever the pipe closes."""
    command = [sys.executable, "-m", "mezzotint", *args]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""


def test_troubleshooting_lists_every_sampler():
    from mezzotint.process import samplers

    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    names = ", ".join(f"`{name}`" for name in samplers.registry)
    assert f"The samplers of `--sampler` are {names}." in " ".join(page.split())


def test_sampling_lists_every_sampler_and_protocol():
    from mezzotint.process import samplers
    from mezzotint.sampling.protocols import PROTOCOLS

    sampling = (ROOT / "docs" / "sampling.md").read_text(encoding="utf-8")
    protocols = (ROOT / "docs" / "protocols.md").read_text(encoding="utf-8")
    assert [name for name in samplers.registry if f"`{name}`" not in sampling] == []
    assert [name for name in PROTOCOLS if f"`{name}`" not in protocols] == []


def test_api_reference_lists_the_public_names():
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert {"__version__", *re.findall(r"`mz\.(\w+)`", page)} == set(mz.__all__)
    assert all(getattr(mz, name) is not None for name in mz.__all__)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_mentioned_command_exists(page):
    for text in inline_code(page):
        if command := re.match(r"mezzotint ([a-z][\w-]*)", text):
            assert command[1] in cli.COMMANDS, text
        if target := re.match(r"make ([a-z][\w-]*)$", text):
            assert re.search(rf"^{target[1]}:", MAKEFILE, re.M), text


def test_every_make_target_exists():
    lines = [line for block in BLOCKS for line in shell_lines(block)]
    targets = [m[1] for line in lines if (m := re.match(r"make ([\w-]+)", line))]
    assert targets
    assert all(re.search(rf"^{name}:", MAKEFILE, re.M) for name in targets)


def find_script_commands():
    """Return the arguments of every command that runs one of the repository's Python files."""
    lines = [line for block in BLOCKS for line in shell_lines(block)]
    lines += [text for _, text in INLINE]
    scripts = [m[1] for line in lines if (m := re.match(r"(?:# )?python (\w\S*\.py.*)", line))]
    return sorted({tuple(shlex.split(line, comments=True)) for line in scripts})


SCRIPTS = find_script_commands()


@pytest.mark.parametrize("args", SCRIPTS, ids=" ".join)
def test_every_script_has_its_options(args, monkeypatch, capsys):
    script = ROOT / args[0]
    assert script.is_file()
    options = [a for a in args[1:] if a.startswith("--")]
    if options:
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", [args[0], "--help"])
        monkeypatch.setattr(sys, "path", [str(script.parent), *sys.path])
        with pytest.raises(SystemExit) as exited:
            runpy.run_path(args[0], run_name="__main__")
        assert exited.value.code in (None, 0)
        help_text = capsys.readouterr().out
        assert [o for o in options if not re.search(rf"{o}\b", help_text)] == []


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.lang == "bash"], ids=lambda b: b.page)
def test_every_shell_script_parses(block):
    subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_mentioned_source_file_exists(page):
    examples = {block.mark.removeprefix("file: ") for block in BLOCKS if block.mark}
    roots = [ROOT, ROOT / "src" / "mezzotint", ROOT / "docs"]
    pattern = r"[\w./-]+\.(py|ipynb|sh)|(benchmarks|tests|docs|src)/[\w./-]*"
    for text in set(inline_code(page)) - examples:
        if re.fullmatch(pattern, text):
            assert any((root / text).exists() for root in roots), f"{page.name} mentions {text}"


def test_the_pages_have_commands_and_code():
    """Guard against a pattern above that no longer matches anything."""
    assert len(INLINE_COMMANDS) > 10
    assert len(SCRIPTS) > 3
    assert len(COMMANDS) > 40
    assert sum(block.lang == "python" for block in BLOCKS) > 5


@pytest.mark.parametrize(
    "block",
    [pytest.param(b, id=f"{b.page}-{i}") for i, b in enumerate(BLOCKS) if b.lang == "python"],
)
def test_every_python_block_compiles(block):
    compile(block.text, block.page, "exec")


@pytest.mark.parametrize("page", sorted({b.page for b in BLOCKS if b.mark == "run"}))
def test_marked_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in (b for b in BLOCKS if b.page == page and b.mark == "run"):
        if block.lang == "python":
            exec(compile(block.text, page, "exec"), names)
        for args in read_commands(block):
            run_cli(args, monkeypatch, cli.COMMANDS)


USE_EXAMPLES = """
import example0, example1, example2, torch
import mezzotint as mz
from mezzotint.core.registry import Spec, build
from mezzotint.process import schedules

u = torch.tensor([0.01, 0.25, 0.5, 0.75, 0.99])
logsnr = build(schedules.registry, Spec("laplace", {"mean": 1.0}))(u)
assert (logsnr.diff() < 0).all() and logsnr[2] == 1, logsnr
assert torch.allclose(logsnr + logsnr.flip(0), torch.tensor(2.0)), logsnr

torch.manual_seed(0)
model = mz.create_model("mixer-tiny", size=16).eval().requires_grad_(False)
model.backbone.head.weight.normal_(0, 0.02)
best = mz.sample(model, [1, 2], label=3, sampler="ddim", steps=200)
ddim, midpoint = (
    mz.sample(model, [1, 2], label=3, sampler=s, steps=20) for s in ("ddim", "midpoint")
)
assert (midpoint - best).abs().max() < (ddim - best).abs().max() / 2

mz.save_model(model, "saved")
assert mz.load_model("saved").info.preset == "mixer-tiny"
"""


def test_the_files_of_extending_work(tmp_path):
    """They run in their own process, so that other tests do not find them registered."""
    files = [b.text for b in BLOCKS if b.mark and b.mark.startswith("file:")]
    assert len(files) == 3
    for i, text in enumerate(files):
        (tmp_path / f"example{i}.py").write_text(text)
    (tmp_path / "use.py").write_text(USE_EXAMPLES)
    done = subprocess.run([sys.executable, "use.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_and_images_exist(page):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in (m[1] or m[2] for m in LINK.finditer(text)):
        message = f"{page.name} links to {target}"
        if "://" in target:  # the tests have no network, so only the form is checked
            address = urlsplit(target)
            assert address.scheme == "https", message
            assert re.fullmatch(r"[\w-]+(\.[\w-]+)+", address.netloc), message
            continue
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), message
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.M)
            slugs = {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}
            assert anchor in slugs, f"{message}; {path} has {sorted(slugs)}"


def test_every_image_is_used():
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    images = sorted((ROOT / "docs" / "images").iterdir())
    assert [image.name for image in images if f"images/{image.name})" not in text] == []


def test_the_speed_table_is_current():
    """If it fails, run `python docs/make_tables.py`."""
    table = runpy.run_path(str(ROOT / "docs" / "make_tables.py"))["speed"]()
    assert table in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_studio_page_lists_its_limits():
    limits = Limits()
    page = " ".join((ROOT / "docs" / "studio.md").read_text(encoding="utf-8").split())
    for limit in (
        f"{limits.images} images",
        f"{limits.steps} steps",
        f"{limits.seconds / 60:g} minutes of computing",
        f"{limits.prompt_chars:,} characters",
    ):
        assert limit in page


@pytest.mark.parametrize("preset", ["unet-tiny", "dimr-tiny", "diffit-tiny"])
def test_the_cost_table_is_current(preset):
    """Count again what docs/make_tables.py wrote."""
    counted = count_preset(preset)
    table = (ROOT / "docs" / "backbones.md").read_text(encoding="utf-8")
    start = f"| `{preset}` | {counted['input_shape'][1]}x"
    (row,) = [line for line in table.splitlines() if line.startswith(start)]
    assert format_count(counted["params"]) in row
    assert f"{counted['gmac']:.2f}" in row
