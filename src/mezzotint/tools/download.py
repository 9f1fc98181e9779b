"""Download the files that a recipe needs, its autoencoder and its text encoder; and CLIP's.

Files go to our cache ($MEZZOTINT_CACHE, by default ~/.cache/mezzotint), under codecs/, text/ and
clip/. For a machine without network access, download on another one and copy that folder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from mezzotint import config
from mezzotint.backbones import text_width
from mezzotint.config import Recipe
from mezzotint.core.files import cache_dir, expand_user, format_bytes, sha256_of_file
from mezzotint.data import autoencoder, text_encoder
from mezzotint.evaluate import clip
from mezzotint.models import preset_info, presets
from mezzotint.recipes import FEW_STEPS, recipe_for


@dataclass(frozen=True)
class Requirement:
    """A pretrained model that a recipe needs.

    name: as in the recipe.
    purpose: what it is needed for.
    repo: repository on the hub; None for a local folder.
    patterns: its files, as glob patterns.
    target: folder to download to.
    folder: where it is now; None if it is not on this machine.
    revision: the commit of the repository; None for its newest.
    """

    name: str
    purpose: str
    repo: str | None
    patterns: tuple[str, ...]
    target: Path
    folder: Path | None
    revision: str | None = None


@dataclass(frozen=True)
class RequiredFile:
    """A file of a `Requirement`; size (bytes) and SHA-256 are None where unknown."""

    name: str
    size: int | None
    sha256: str | None


def find_requirements(what: str, overrides: Sequence[str] = ()) -> list[Requirement]:
    """Return what a recipe needs, or the autoencoder, text encoder or CLIP model of a name.

    Args:
        what: a preset, a recipe.yaml, an autoencoder, or OWNER/NAME on the hub; with "t5" or "clip"
            in the name, a text encoder or a CLIP model.
        overrides: fields of the recipe, FIELD=VALUE.

    Errors: ValueError for a name that is none of these.
    """
    is_preset = what.removesuffix(FEW_STEPS) in presets()
    if is_preset or Path(what).suffix in (".yaml", ".yml"):
        recipe = recipe_for(what) if is_preset else config.from_yaml(what)
        return recipe_requirements(config.override(recipe, overrides))
    if what in autoencoder.RELEASES:
        return [_autoencoder(what, "an autoencoder")]
    if what.count("/") == 1 and not what.startswith((".", "/", "~")):
        name = what.lower()
        if "t5" in name:
            return [_text_encoder(what)]
        return [_clip(what) if "clip" in name else _autoencoder(what, "an autoencoder")]
    raise ValueError(
        f"unknown name {what!r}; give a preset, a recipe.yaml, an autoencoder "
        f"({', '.join(autoencoder.RELEASES)}), or OWNER/NAME of an autoencoder, T5 encoder or CLIP "
        "model"
    )


def recipe_requirements(recipe: Recipe) -> list[Requirement]:
    """Return the autoencoder, the sample grids' decoder and the text encoder; may be empty."""
    info = preset_info(recipe.preset, **recipe.model)
    codec = recipe.data.codec or info.codec
    requirements = []
    if codec != "pixels":
        requirements.append(_autoencoder(codec, "encodes images and decodes samples"))
    if codec in autoencoder.SD_LATENTS and codec != "taesd":
        purpose = "decodes a run's sample grids faster than the autoencoder"
        requirements.append(_autoencoder("taesd", purpose))
    if text_width(info.config):
        requirements.append(_text_encoder(recipe.data.text_encoder or text_encoder.XXL))
    return requirements


def _autoencoder(name: str, purpose: str) -> Requirement:
    release = autoencoder.RELEASES.get(name)
    return Requirement(
        name,
        purpose,
        repo=release.repo if release else _repo_of(name),
        patterns=release.files if release else autoencoder.DIFFUSERS_FILES,
        target=cache_dir() / "codecs" / name,
        folder=_find_locally(autoencoder.find_autoencoder, name),
    )


def _text_encoder(name: str) -> Requirement:
    return Requirement(
        name,
        "embeds captions",
        repo=_repo_of(name),
        patterns=text_encoder.FILES,
        target=cache_dir() / "text" / name,
        folder=_find_locally(text_encoder.find_text_encoder, name),
    )


def _clip(name: str) -> Requirement:
    return Requirement(
        name,
        "scores images against captions",
        repo=_repo_of(name),
        patterns=clip.FILES,
        target=cache_dir() / clip.KIND.shelf / name,
        folder=_find_locally(clip.find_clip, name),
        revision=clip.REVISIONS.get(name),
    )


def _repo_of(name: str) -> str | None:
    return None if expand_user(name).is_dir() else name


def _find_locally(find: Callable[..., Path], name: str) -> Path | None:
    try:
        return find(name, fetch=False)
    except ValueError:
        return None


def list_local_files(requirement: Requirement) -> list[RequiredFile]:
    """Return the files on this machine with the hashes of their bytes."""
    folder = requirement.folder
    if folder is None:
        return []
    matches = {path for pattern in requirement.patterns for path in folder.glob(pattern)}
    paths = sorted(path for path in matches if path.is_file())
    return [RequiredFile(path.name, path.stat().st_size, sha256_of_file(path)) for path in paths]


def list_hub_files(requirement: Requirement) -> list[RequiredFile]:
    """Return the files on the hub, with its sizes and hashes; ValueError without an answer."""
    from huggingface_hub import HfApi

    repo = requirement.repo or ""
    try:
        info = HfApi().model_info(repo, files_metadata=True, revision=requirement.revision)
        siblings = info.siblings or []
    except Exception as error:  # the hub and the network raise their own kinds
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(f"the hub does not answer for {repo}: {reason}") from None
    return [
        RequiredFile(s.rfilename, s.size, s.lfs.sha256 if s.lfs else None)
        for s in siblings
        if any(fnmatch(s.rfilename, pattern) for pattern in requirement.patterns)
    ]


def _format_requirement(requirement: Requirement, files: Sequence[RequiredFile]) -> str:
    place = (
        f"in {requirement.folder}"
        if requirement.folder
        else f"not on this machine; goes to {requirement.target}"
    )
    lines = [f"{requirement.name} ({requirement.purpose}): {place}"]
    for file in files:
        size = "unknown size" if file.size is None else format_bytes(file.size)
        sha256 = f"sha256 {file.sha256}" if file.sha256 else "no hash stated"
        lines.append(f"  {file.name}  {size}  {sha256}")
    return "\n".join(lines)


def _fetch(requirement: Requirement, files: Sequence[RequiredFile]) -> Path:
    """Download to the target and check the hub's hashes; ValueError where a file differs."""
    from huggingface_hub import snapshot_download

    repo, patterns, target = requirement.repo or "", requirement.patterns, requirement.target
    if not files:
        raise ValueError(f"{repo} has none of {', '.join(patterns)}; is it the right repository?")
    snapshot_download(
        repo,
        allow_patterns=list(patterns),
        local_dir=str(target),
        revision=requirement.revision,
    )
    for file in files:
        path = target / file.name
        if file.sha256 and sha256_of_file(path) != file.sha256:
            raise ValueError(
                f"{path} is damaged (the hub states SHA-256 {file.sha256}); "
                "delete it and download again"
            )
    return target


def download_requirements(requirements: Sequence[Requirement], only_list: bool = False) -> str:
    """Download what is missing, or with `only_list` nothing; return the list of files as text.

    Errors: ValueError naming everything that could not be downloaded, after downloading the rest.
    """
    if not requirements:
        return "this recipe needs no files"
    lines, failures = [], []
    for requirement in requirements:
        if requirement.folder is not None or requirement.repo is None:
            lines.append(_format_requirement(requirement, list_local_files(requirement)))
            continue
        try:
            files = list_hub_files(requirement)
            lines.append(_format_requirement(requirement, files))
            if not only_list:
                lines.append(f"  downloaded to {_fetch(requirement, files)}")
        except (ValueError, OSError) as error:
            lines.append(_format_requirement(requirement, []))
            failures.append(
                f"{requirement.name}: {error}; put {' and '.join(requirement.patterns)} of "
                f"{requirement.repo} into {requirement.target}"
            )
    if failures and not only_list:
        raise ValueError("\n".join([*lines, "could not be downloaded:", *failures]))
    return "\n".join([*lines, *failures])
