"""`mezzotint prefetch`: everything a recipe needs from elsewhere, listed with sizes and hashes, and fetched.

What is fetched lands in our cache ($MEZZOTINT_CACHE, else ~/.cache/mezzotint), under codecs/ and text/. For a machine
without network, prefetch on another one and copy that folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mezzotint.backbones import text_width
from mezzotint.config import Recipe
from mezzotint.core.files import cache_dir, format_bytes, sha256_of_file
from mezzotint.data import autoencoder, text_encoder
from mezzotint.models import preset_info


@dataclass(frozen=True)
class Need:
    """One thing that a recipe needs.

    name: as a recipe says it. why: what for. repo: on the hub; None for a folder. patterns: of its files.
    target: where it is put. folder: where it is now, None if it is not on this machine.
    """

    name: str
    why: str
    repo: str | None
    patterns: tuple[str, ...]
    target: Path
    folder: Path | None


@dataclass(frozen=True)
class Found:
    """A file of a `Need`: bytes and SHA-256, where they are known."""

    name: str
    bytes: int | None
    sha256: str | None


def _here(find: Any, name: str) -> Path | None:
    try:
        return find(name, fetch=False)
    except ValueError:
        return None


def codec_need(name: str, why: str) -> Need:
    """An autoencoder by name, folder or repository."""
    release = autoencoder.RELEASES.get(name)
    repo = release.repo if release else None if Path(name).expanduser().is_dir() else name
    files = release.files if release else ("config.json", "diffusion_pytorch_model.safetensors")
    target = cache_dir() / "codecs" / name
    return Need(name, why, repo, files, target, _here(autoencoder.find_autoencoder, name))


def text_need(name: str) -> Need:
    """A text encoder by folder or repository."""
    repo = None if Path(name).expanduser().is_dir() else name
    return Need(
        name,
        "reads captions",
        repo,
        text_encoder.FILES,
        cache_dir() / "text" / name,
        _here(text_encoder.find_text_encoder, name),
    )


def needs_of(recipe: Recipe) -> list[Need]:
    """The autoencoder, the one that shows grids while training, and the text encoder of a recipe; may be empty."""
    card = preset_info(recipe.preset, **recipe.model)
    space, needs = recipe.data.codec or card.codec, []
    if space != "pixels":
        needs.append(codec_need(space, "encodes pictures, decodes samples"))
    if space in autoencoder.SD_LATENTS and space != "taesd":
        needs.append(
            codec_need("taesd", "decodes the grids of a run (without it: the autoencoder itself)")
        )
    if text_width(card.config):
        needs.append(text_need(recipe.data.text_encoder or text_encoder.XXL))
    return needs


def needs_for(what: str, recipe: Recipe | None) -> list[Need]:
    """Of a recipe, or of a codec or text encoder by name; ValueError for a name that is neither."""
    if recipe is not None:
        return needs_of(recipe)
    if what in autoencoder.RELEASES:
        return [codec_need(what, "an autoencoder")]
    if what.count("/") == 1 and not what.startswith((".", "/", "~")):
        return [text_need(what) if "t5" in what.lower() else codec_need(what, "an autoencoder")]
    raise ValueError(
        f"nothing is known of {what!r}; give a preset, a recipe.yaml, a codec ({', '.join(autoencoder.RELEASES)}), or "
        "OWNER/NAME of an autoencoder or T5 encoder"
    )


def local_files(need: Need) -> list[Found]:
    """The files on this machine with their hashes."""
    if need.folder is None:
        return []
    paths = sorted(
        {path for pattern in need.patterns for path in need.folder.glob(pattern) if path.is_file()}
    )
    return [Found(path.name, path.stat().st_size, sha256_of_file(path)) for path in paths]


def remote_files(need: Need) -> list[Found]:
    """The files on the hub, sizes and hashes as it states them; ValueError when it cannot be asked."""
    from fnmatch import fnmatch

    from huggingface_hub import HfApi

    try:
        siblings = HfApi().model_info(need.repo or "", files_metadata=True).siblings or []
    except Exception as error:  # the hub and the network raise their own
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{need.repo} cannot be asked for: {first}") from None
    wanted = [
        s for s in siblings if any(fnmatch(s.rfilename, pattern) for pattern in need.patterns)
    ]
    return [Found(s.rfilename, s.size, s.lfs.sha256 if s.lfs else None) for s in wanted]


def listing(need: Need, files: Sequence[Found]) -> str:
    """A need and its files in lines."""
    place = f"in {need.folder}" if need.folder else f"not on this machine; goes to {need.target}"
    lines = [f"{need.name} ({need.why}): {place}"]
    for f in files:
        size = format_bytes(f.bytes) if f.bytes is not None else "size unknown"
        lines.append(
            f"  {f.name}  {size}  {'sha256 ' + f.sha256 if f.sha256 else 'no hash stated'}"
        )
    return "\n".join(lines)


def fetch_files(need: Need) -> Path:
    """Download a need to its target and compare with the hub's hashes; ValueError where it cannot be had or differs."""
    from huggingface_hub import snapshot_download

    expected = {f.name: f for f in remote_files(need)}
    if not expected:
        raise ValueError(
            f"{need.repo} holds none of {', '.join(need.patterns)}; is it the right repository?"
        )
    snapshot_download(
        need.repo or "", allow_patterns=list(need.patterns), local_dir=str(need.target)
    )
    for name, stated in expected.items():
        path = need.target / name
        if stated.sha256 and sha256_of_file(path) != stated.sha256:
            raise ValueError(
                f"{path} is not what the hub states (SHA-256 {stated.sha256}); delete it and fetch again"
            )
    return need.target


def download(needs: Sequence[Need], only_list: bool = False) -> str:
    """List, and unless `only_list` fetch what is missing; the listing as text.

    Errors: ValueError naming everything that could not be fetched, after fetching the rest.
    """
    if not needs:
        return "nothing: this recipe needs no file from elsewhere"
    said, failed = [], []
    for need in needs:
        if need.folder is not None or need.repo is None:
            said.append(listing(need, local_files(need)))
            continue
        try:
            said.append(listing(need, remote_files(need)))
            if not only_list:
                said.append(f"  fetched to {fetch_files(need)}")
        except (ValueError, OSError) as error:
            said.append(listing(need, []))
            failed.append(
                f"{need.name}: {error}; put {' and '.join(need.patterns)} of {need.repo} into {need.target}"
            )
    if failed and not only_list:
        raise ValueError("\n".join([*said, "could not be fetched:", *failed]))
    return "\n".join([*said, *failed])
