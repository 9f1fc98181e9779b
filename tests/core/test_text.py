"""Strings of strangers do nothing to a terminal, a Markdown page or a reader of paths."""

from __future__ import annotations

import json

import pytest

from mezzotint.core.text import (
    escape_controls,
    escape_markdown,
    escape_name,
    fence,
    hide_folders,
)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b]0;owned\x07\x1b[31m", r"\x1b]0;owned\x07\x1b[31m"),
        ("\x9b31m", r"\u009b31m"),  # the one-byte form of ESC [
        ("abc\x7f\x08\x08\x08", r"abc\u007f\x08\x08\x08"),
        ("safe\u202egnp.exe", r"safe\u202egnp.exe"),
        ("\u2066a\u2069\u200f\ufeff", r"\u2066a\u2069\u200f\ufeff"),
        ("line\u2028\u2029\x85", r"line\u2028\u2029\u0085"),
        ("\udcff.png", r"\udcff.png"),  # a byte that is no UTF-8
        ("\U000e0041", r"\U000e0041"),
        ("over\rwritten", r"over\rwritten"),
    ],
)
def test_hidden_characters_are_shown(text, shown):
    assert escape_controls(text) == escape_name(text) == shown


@pytest.mark.parametrize(
    "text", ["tench, Tinca tinca", "猫と犬", "क्‍ष", "می‌خواهم", "👩‍🔬", "é", "[/b] :dog: \\n", "a\tb"]
)
def test_any_script_stays_as_it_is(text):
    assert escape_controls(text) == text


def test_a_name_is_one_line():
    assert escape_controls("a\nb") == "a\nb"
    assert escape_name("a\n# Licence: MIT\r\n\tx") == r"a\n# Licence: MIT\r\n\tx"


def test_escaped_json_is_json():
    value = {"name": "\x1b[31m\u202e\x9b\udcff"}
    text = escape_controls(json.dumps(value, ensure_ascii=False))
    assert json.loads(text) == value


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("<script>alert(1)</script>", "&lt;script&gt;alert(1)&lt;/script&gt;"),
        ("![x](http://a.b)", r"!\[x\](http\://a.b)"),
        ("a | b", r"a \| b"),
        ("`code` *b* _i_ ~~s~~", r"\`code\` \*b\* \_i\_ \~\~s\~\~"),
        ("a\n# Licence: MIT", r"a\\n# Licence: MIT"),
        ("www.x.y a@b.c &lt; $x$", r"www\.x.y a\@b.c &amp;lt; \$x\$"),
        ("tench, Tinca tinca: 5-4 (x)", "tench, Tinca tinca: 5-4 (x)"),
    ],
)
def test_markdown_shows_what_is_written(text, shown):
    assert escape_markdown(text) == shown


def test_nothing_ends_a_code_block():
    text = "a: |\n  x\n````\n# owned\n```"
    lines = fence(text, "yaml")
    assert lines[0] == "`````yaml"
    assert lines[-1] == "`````"
    assert lines[1] == text
    assert fence("plain") == ["```", "plain", "```"]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("/home/alice/project x/ref.npz", "ref.npz"),
        ("~/secret/ref.npz", "ref.npz"),
        ("~alice/secret/ref.npz", "ref.npz"),
        ("../secret/ref.npz", "ref.npz"),
        ("C:\\Users\\alice\\ref.npz", "ref.npz"),
        ("\\\\server\\share\\ref.npz", "ref.npz"),
        ("file:///home/alice/ref.npz", "ref.npz"),
        ("weights of /home/alice/w.pth, 2 GB", "weights of w.pth, 2 GB"),
        ("(/mnt/a/b)", "(b)"),
        ("stabilityai/sd-vae-ft-mse", "stabilityai/sd-vae-ft-mse"),
        ("https://huggingface.co/a/b", "https://huggingface.co/a/b"),
        ("images/s, 1/2 and a / b", "images/s, 1/2 and a / b"),
        ({"a": ["/x/y", 3, None]}, {"a": ["y", 3, None]}),
    ],
)
def test_folders_are_hidden(value, shown):
    assert hide_folders(value) == shown
