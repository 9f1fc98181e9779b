"""Prompts as people write them: files of lines and of rows, and what is wrong with a row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mezzotint.sampling.prompts import Prompt, parse_prompt, read_prompts, read_texts


def write(folder: Path, name: str, content: str | bytes) -> Path:
    data = content if isinstance(content, bytes) else content.encode()
    (folder / name).write_bytes(data)
    return folder / name


def test_a_text_file_has_one_prompt_a_line(tmp_path):
    lines = "\ufeff a red ring \r\n\r\n面白い猫\rعلى اليسار\na\u2028b\x85c (red:1.5)"
    file = write(tmp_path, "prompts.txt", lines)
    assert read_texts(file) == (
        "a red ring", "面白い猫", "على اليسار", "a\u2028b\x85c (red:1.5)"
    )  # fmt: skip


def test_rows_have_settings_of_their_own(tmp_path):
    rows = [
        {"text": "a red ring\nat the top", "file_name": "1.png", "width": 512},
        {"text": "", "negative": "blue", "seed": 7, "guidance": 3, "size": "48x64"},
        {"text": "b\u2028c", "negative": None, "size": 32},
        {"text": "d", "size": [16, 8], "guidance": 0.5},
    ]
    content = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    read = read_prompts(write(tmp_path, "metadata.jsonl", content))
    assert read == (
        Prompt(text="a red ring\nat the top"),
        Prompt(text="", negative="blue", seed=7, guidance=3.0, size=(48, 64)),
        Prompt(text="b\u2028c", size=(32, 32)),
        Prompt(text="d", size=(16, 8), guidance=0.5),
    )
    assert read[0].to_json() == "a red ring\nat the top"
    assert [parse_prompt(p.to_json()) for p in read[1:]] == list(read[1:])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ('["a"]', r"not an object, e\.g"),
        ('{"txt": "a"}', "unknown field 'txt'; did you mean text"),
        ('{"caption": "a"}', "no field 'text' with words; fields: caption"),
        ('{"text": null}', "no field 'text'"),
        ('{"text": 3}', "no field 'text'"),
        ('{"text": "a", "Guidance": 3}', "unknown field 'Guidance'; did you mean guidance"),
        ('{"text": "a", "guidance": "strong"}', "guidance is 'strong'; a number is needed"),
        ('{"text": "a", "guidance": NaN}', "guidance nan must be"),
        ('{"text": "a", "negative": 1}', "negative is 1; text is needed"),
        ('{"text": "a", "seed": -1}', "seed -1 must be at least 0"),
        ('{"text": "a", "seed": 0.5}', "seed is 0.5; a whole number is needed"),
        ('{"text": "a", "size": "big"}', "neither a number nor HEIGHTxWIDTH"),
        ('{"text": "a", "size": [1, 2, 3]}', "size has 3 values; 2 are needed"),
        ('{"text": "a", "size": 99999}', "size.* must be at least 1 and at most 16,384"),
        ('{"text": "a", "size": true}', "size is True; a list is needed"),
        ('{"text": "\\ud800"}', "half a character"),
        ('{"text": "a", "text": "b"}', "'text' is there twice"),
    ],
)
def test_a_bad_row_is_named_by_its_line(tmp_path, line, message):
    file = write(tmp_path, "rows.jsonl", f'{{"text": "a"}}\n\n{line}\n')
    with pytest.raises(ValueError, match=f"line 3: .*{message}") as caught:
        read_prompts(file)
    assert "\n" not in str(caught.value)


def test_files_without_prompts_are_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no prompt"):
        read_prompts(write(tmp_path, "none.txt", "\n \n"))
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        read_prompts(tmp_path / "absent.txt")
    with pytest.raises(ValueError, match="cannot be read: it is a folder"):
        read_prompts(tmp_path)
    with pytest.raises(ValueError, match="line 2 is not UTF-8"):
        read_prompts(write(tmp_path, "latin.txt", "rot\nblau grün".encode("latin-1")))
    rows = write(tmp_path, "rows.jsonl", '{"text": "a ring", "guidance": 3}')
    with pytest.raises(ValueError, match="'a ring' has settings of its own"):
        read_texts(rows)
