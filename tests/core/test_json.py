"""Reading JSON of strangers: a value, or one ValueError."""

from __future__ import annotations

import json

import pytest

from helpers.hostile import TEXTS
from mezzotint.core.fields import shorten
from mezzotint.core.files import read_json
from mezzotint.core.json_values import JSON_DEPTH, check_fields, parse_json


@pytest.mark.parametrize("name", [n for n in TEXTS if n not in ("null", "number", "list")])
def test_hostile_texts_are_refused(name, tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(TEXTS[name])
    if name == "escapes":  # JSON after all; an error that quotes it shows no escape
        assert "\x1b" not in shorten(read_json(path))
        return
    with pytest.raises(ValueError, match=r"a\.json cannot be read as JSON: .*; write it again"):
        read_json(path)


@pytest.mark.parametrize("text", [b"null", b"7", b"[]", b'"x"'])
def test_only_objects_are_read(text, tmp_path):
    (tmp_path / "a.json").write_bytes(text)
    with pytest.raises(ValueError, match="no JSON object"):
        read_json(tmp_path / "a.json")


def test_depth():
    for depth, good in ((JSON_DEPTH, True), (JSON_DEPTH + 1, False)):
        for text in ("[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth):
            if good:
                parse_json(text)
            else:
                with pytest.raises(ValueError, match="deeper than"):
                    parse_json(text)


def test_a_key_that_is_there_twice_is_named():
    with pytest.raises(ValueError, match="'b' is there twice"):
        parse_json('{"a": {"b": 1, "c": 2, "b": 1}}')


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (int, [0, -3, 10**30], [True, 1.5, "1", None, [1]]),
        (float, [0, 1.5], [True, "1", None]),
        (str, ["", "x"], [1, None, ["x"]]),
        (bool, [True], [1, "true"]),
        (str | None, [None, "x"], [0, []]),
        (list[int], [[], [1]], [[True], ["1"], 1, {}]),
        (list[str] | None, [None, ["x"]], [[None], "x"]),
        (dict[str, str], [{}, {"a": "b"}], [{"a": 1}, [], None]),
        (dict, [{}, {"a": [1]}], [[], "{}"]),
    ],
)
def test_check_fields(kind, good, bad):
    for value in good:
        check_fields(json.loads(json.dumps({"x": value})), {"x": kind})
    for value in bad:
        with pytest.raises(ValueError, match=r"its 'x' is .* is needed"):
            check_fields({"x": value}, {"x": kind})
    with pytest.raises(ValueError, match="it has no 'x'"):
        check_fields({}, {"x": kind})
