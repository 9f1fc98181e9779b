"""The Hugging Face hub: files of a repository, from its cache or a download."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mezzotint.core.boxed import suggest_boxed
from mezzotint.core.paths import explain_path, is_hub_name


def download_model(repo: str, names: Sequence[str]) -> Path:
    """Return the folder of a model repository's files, from the cache if they are there.

    Errors: ValueError for a name that is none of the hub's, and where the hub does not have it.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if not is_hub_name(repo):
        raise ValueError(
            f"{explain_path(repo, 'a model folder')}; give a run folder, a model folder, or the "
            f"name of a hub repository (owner/name){suggest_boxed(repo)}"
        )
    try:
        return Path(snapshot_download(repo, allow_patterns=list(names)))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"there is no folder {repo}, and the hub has no such repository for us: {reason}"
        ) from None
