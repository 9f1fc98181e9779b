"""Prompts: what each image shows, one by one or from a file with a prompt a line."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from mezzotint.core.fields import MOST_SEED, Checked, Range, parse, shorten
from mezzotint.core.files import open_regular
from mezzotint.core.json_values import first_line, parse_json
from mezzotint.data.text_encoder import TextEncoder
from mezzotint.sampling.parse import parse_size
from mezzotint.sampling.settings import Side

JSON_LINES = (".jsonl", ".ndjson")
MOST_BYTES = 256 << 20  # of a file of prompts; a million captions have about 60 MB


@dataclass(frozen=True, kw_only=True)
class Prompt(Checked):
    """What one image shows; None takes what holds for all images.

    text: any words; the text encoder reads them as they are, and weights in parentheses are words
        too. Empty for the empty caption.
    negative: guides away from these words in place of the empty caption.
    seed: of the noise.
    guidance: scale in the convention of the settings.
    size: (height, width) of the network's input.
    """

    text: str
    negative: str | None = None
    seed: Annotated[int, Range(0, MOST_SEED)] | None = None
    guidance: Annotated[float, Range(-1000, 1000, "e.g. 1.5")] | None = None
    size: tuple[Side, Side] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("text", "negative"):
            words = getattr(self, name) or ""
            if any(0xD800 <= ord(c) <= 0xDFFF for c in words):
                raise ValueError(f"{name} {shorten(words)} holds half a character (a surrogate)")

    def to_json(self) -> str | dict[str, Any]:
        """Return the prompt as a JSON value: its text, or its fields where it has more."""
        fields = {key: getattr(self, key) for key in FIELDS}
        given = {key: value for key, value in fields.items() if value is not None}
        return self.text if len(given) == 1 else given


FIELDS = ("text", "negative", "seed", "guidance", "size")
# As other programs write the weight of a word: "(red:1.5)".
WEIGHT = re.compile(r"\([^()]+:\s*[\d.]+\s*\)")


def make_prompts(prompts: Sequence[str | Prompt], negative: str | None) -> tuple[Prompt, ...]:
    """Return prompts of texts and of prompts; `negative` is for those that have none."""
    made = [p if isinstance(p, Prompt) else Prompt(text=p) for p in prompts]
    return tuple(replace(p, negative=negative) if p.negative is None else p for p in made)


def describe_cut(encoder: TextEncoder, prompts: Sequence[Prompt]) -> list[str]:
    """Return what a model does not read of its prompts: a line on their ends, one on weights."""
    texts = list(dict.fromkeys(t for p in prompts for t in (p.text, p.negative) if t))
    counts = {text: encoder.count_tokens(text) for text in texts}
    long, lines = [t for t in texts if counts[t] > encoder.max_tokens], []
    if long:
        longest = max(long, key=counts.__getitem__)
        lines.append(
            f"{len(long)} of {len(texts)} texts are cut to the {encoder.max_tokens} tokens that "
            f"the model reads; {shorten(longest)} has {counts[longest]}"
        )
    if weighted := next((t for t in texts if WEIGHT.search(t)), None):
        lines.append(f"weights in parentheses are read as words: {shorten(weighted)}")
    return lines


def read_prompts(path: Path) -> tuple[Prompt, ...]:
    """Read a file of prompts in UTF-8; blank lines are skipped.

    A .jsonl (or .ndjson, e.g. a data set's metadata.jsonl) has one JSON object a line with the
    fields of `Prompt`; `size` is 64, "48x64" or [48, 64], height first, null is a field left out,
    and other columns are ignored. Any other file has one text a line.

    Errors: ValueError, with the number of the line, for a line that is no prompt; for a file that
        cannot be read or has no prompt.
    """
    try:
        with open_regular(path) as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise ValueError(f"it has more than {MOST_BYTES >> 20} MiB; split it")
        text = content.decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise ValueError(f"prompts {path} cannot be read: {_explain(error)}") from None
    read_line = read_row if path.suffix.lower() in JSON_LINES else _read_text
    # Not str.splitlines, which also ends lines at characters that a JSON text may hold.
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    prompts = tuple(
        _with_line_number(path, number, read_line, line)
        for number, line in enumerate(lines, 1)
        if line.strip()
    )
    if not prompts:
        raise ValueError(f"{path} holds no prompt; write one per line")
    return prompts


def read_texts(path: Path) -> tuple[str, ...]:
    """Read the texts alone of a file of prompts, where one setting holds for all images.

    Errors: ValueError as `read_prompts`, and for a prompt with a setting of its own.
    """
    prompts = read_prompts(path)
    for prompt in prompts:
        if prompt != Prompt(text=prompt.text):
            raise ValueError(
                f"{path}: {shorten(prompt.text)} has settings of its own, but here one setting "
                "holds for all prompts; leave out its " + ", ".join(FIELDS[1:])
            )
    return tuple(prompt.text for prompt in prompts)


def _explain(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        line = error.object.count(b"\n", 0, error.start) + 1
        return f"line {line} is not UTF-8; save the file as UTF-8"
    return getattr(error, "strerror", None) or str(error)


def _with_line_number(
    path: Path, number: int, read_line: Callable[[str], Prompt], line: str
) -> Prompt:
    try:
        return read_line(line)
    except ValueError as error:
        raise ValueError(f"{path}, line {number}: {first_line(error)}") from None


def _read_text(line: str) -> Prompt:
    return Prompt(text=line.strip())


def read_row(line: str) -> Prompt:
    """Return the prompt of a JSON object, see `read_prompts`; ValueError for any other text."""
    try:
        row = parse_json(line)
    except ValueError as error:
        raise ValueError(f"it is not JSON: {first_line(error)}") from None
    if not isinstance(row, dict):
        raise ValueError(f'{shorten(row)} is not an object, e.g. {{"text": "a red ring"}}')
    for key in row:
        near = difflib.get_close_matches(key.lower(), FIELDS, n=1, cutoff=0.75)
        if key not in FIELDS and near:
            raise ValueError(f"unknown field {key!r}; did you mean {near[0]}?")
    if not isinstance(row.get("text"), str):
        raise ValueError(f"it has no field 'text' with words; fields: {', '.join(row) or 'none'}")
    return parse_prompt(row)


def parse_prompt(row: Mapping[str, Any]) -> Prompt:
    """Return the prompt of JSON values, as `Prompt.to_json` writes them and people do.

    Errors: ValueError for a value of another type or out of range.
    """
    fields = {key: row[key] for key in FIELDS if row.get(key) is not None}
    size = fields.get("size")
    if isinstance(size, str):
        fields["size"] = parse_size(size)
    elif isinstance(size, int) and not isinstance(size, bool):
        fields["size"] = (size, size)
    return parse(Prompt, fields, "")
