"""Prepare a dataset as shards, at an address of an object store or in a folder.

Any number of processes on any machines write the shards of one plan, under torchrun or started one
by one. They do not communicate. Each process skips the shards of its share that exist and writes
the others. The process that finds all shards adds up their reports and writes the card. A killed
process therefore costs one shard, a restart is the same command, and the bytes do not depend on the
number of processes.

The launcher is that of training. Ray Data or Dask would bring a scheduler and a cluster of its own.
Shards are independent and writing one twice is harmless, so there is nothing to schedule.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mezzotint.core.distributed import WorkShare, default_device
from mezzotint.core.files import (
    atomic_replace,
    expand_user,
    format_bytes,
    partial_folder,
    remove_partials,
)
from mezzotint.core.json_values import parse_json
from mezzotint.core.object_store import (
    StoredFile,
    is_address,
    join_address,
    list_files,
    local_target,
    read_bytes,
    stat_file,
    upload_file,
    write_bytes,
)
from mezzotint.core.progress import ProgressBar
from mezzotint.data.audit import describe_audit
from mezzotint.data.autoencoder import open_codec
from mezzotint.data.caption_embeddings import check_any_caption, describe_encoder
from mezzotint.data.columns import Columns
from mezzotint.data.encode_latents import measure_latents
from mezzotint.data.image_dataset import open_images
from mezzotint.data.prepared_forms import get_form
from mezzotint.data.shard_format import (
    MAX_LEFT_OUT,
    REPORT_KEY,
    SHARDS_CARD,
    ShardCard,
    ShardEntry,
    shard_name,
)
from mezzotint.data.shard_report import REPORT, add_reports, check_report
from mezzotint.data.shard_writer import ShardPlan, write_shard
from mezzotint.data.text_encoder import open_text_encoder

LOCAL = "file://"
SHARD = re.compile(r"shard-(\d{5,9})\.parquet")
FOOTER_BYTES = 1 << 16  # most footers are shorter
READERS = 16  # requests at a time


def prepare_shards(
    source: str,
    out: str,
    size: int,
    num_shards: int,
    *,
    seed: int = 0,
    form: str = "raw",
    codec_name: str = "pixels",
    encoder_name: str = "",
    text_dtype: str = "float16",
    crop: str = "adm",
    columns: Columns | None = None,
    full_scale: int | None = None,
    progress: bool = True,
) -> str:
    """Write the images of `source`, or their latents, as shards to `out`; resumable.

    Args:
        source, size, crop, columns, full_scale: see `mezzotint.data.image_dataset.open_images`.
        out: an address of an object store, or a folder; new, empty, or with shards of this plan.
        num_shards: 1 to the number of images.
        seed: of the permutation that assigns images to shards.
        form: how images are stored, a name of `mezzotint.data.prepared_forms.FORMS`.
        codec_name: of an autoencoder, to store latents of images and mirror images; or "pixels".
        encoder_name: of a T5 encoder, to store embedded captions too; "" for none.
        text_dtype: of the embedded captions.
        progress: show a bar on standard error.

    Returns: a description of the shards, or of what is left for other processes.

    Errors: ValueError for a plan that cannot be carried out, and an `out` that holds other files
        or shards of another plan; `StoreUnavailable` for a store that does not answer.
    """
    if num_shards < 1:
        raise ValueError(f"{num_shards} shards; give at least 1, e.g. one for each GB of images")
    address = resolve_address(out)
    find_shards(address)  # before anything that takes long
    images = open_images(
        source, size=size, crop=crop, columns=columns, full_scale=full_scale, keep_in_memory=False
    )
    if encoder_name:
        check_any_caption(images.text(i) for i in range(len(images)))
    device = default_device()
    plan = ShardPlan(
        images,
        num_shards,
        get_form(form),
        seed,
        None if codec_name == "pixels" else open_codec(codec_name, device),
        open_text_encoder(encoder_name, device, dtype_name=text_dtype) if encoder_name else None,
    )
    share = WorkShare.from_environment()
    if (card := write_shards(plan, address, share, progress=progress)) is None:
        return (
            f"this process has written its share of {out}; the card will be written when the other "
            "processes have finished"
        )
    return describe_shards(card, parse_json(read_bytes(join_address(address, REPORT))), out)


def resolve_address(text: str) -> str:
    """Return an address as it is, and that of a folder for a path."""
    if is_address(text):
        if "*" in text:
            raise ValueError(f"{text} holds a *, which training takes for a pattern; give a folder")
        return text.rstrip("/")
    return LOCAL + os.path.abspath(expand_user(text))


def find_shards(address: str) -> dict[int, StoredFile]:
    """Return the shards that are there, by number.

    Errors: ValueError where other files are there; hidden ones do not count.
    """
    shards, others = {}, []
    for file in list_files(address, allow_empty=True):
        name = file.address.removeprefix(address).strip("/")
        if match := SHARD.fullmatch(name):
            shards[int(match[1])] = file
        elif not name:
            raise ValueError(f"{address.removeprefix(LOCAL)} is a file; give a folder")
        elif name not in (SHARDS_CARD, REPORT) and not os.path.basename(name).startswith("."):
            others.append(name)
    if others:
        more = " ..." if others[3:] else ""
        raise ValueError(
            f"{address.removeprefix(LOCAL)} holds other files than shards: "
            f"{', '.join(others[:3])}{more}; give an address or folder that is new or empty"
        )
    return shards


def write_shards(
    plan: ShardPlan, address: str, share: WorkShare | None = None, *, progress: bool = False
) -> ShardCard | None:
    """Write this process's share of the shards that are missing.

    Returns: the card, where all shards are there; else None.

    Errors: as `prepare_shards`.
    """
    share = share or WorkShare()
    existing = find_shards(address)
    own = range(share.rank, plan.num_shards, share.world)
    # Of the other shards, two are enough to notice another plan.
    look = {*own, *sorted(existing)[:1], *sorted(existing)[-1:]} & existing.keys()
    _read_reports(plan, [existing[k] for k in sorted(look)])
    done = sum(len(plan.indices(k)) for k in own if k in existing)
    total = sum(len(plan.indices(k)) for k in own)
    with ProgressBar("preparing shards", total, done, show=progress) as bar:
        for k in own:
            if k not in existing:
                _write_missing(plan, k, join_address(address, shard_name(k)), bar)
    existing = find_shards(address)
    if any(k not in existing for k in range(plan.num_shards)):
        return None
    return _complete(plan, address, [file for _, file in sorted(existing.items())])


def _write_missing(plan: ShardPlan, k: int, address: str, bar: ProgressBar) -> None:
    """Write shard k, unless another process has written it by now."""
    if (file := stat_file(address)) is not None:
        _read_reports(plan, [file])
        bar.advance(len(plan.indices(k)))
    elif address.startswith(LOCAL):
        atomic_replace(local_target(address), lambda partial: write_shard(plan, k, partial, bar))
    else:
        with partial_folder(Path(tempfile.gettempdir()) / "mezzotint-shards") as folder:
            path = folder / shard_name(k)
            # Names the file in the error of a full disk.
            atomic_replace(path, lambda partial: write_shard(plan, k, partial, bar))
            upload_file(path, address)


def _read_reports(plan: ShardPlan, files: Iterable[StoredFile]) -> list[dict[str, Any]]:
    """Return the reports of these shards, from their footers; ValueError for another plan."""
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(lambda file: _read_report(plan, file), files))


def _read_report(plan: ShardPlan, file: StoredFile) -> dict[str, Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    where = file.address.removeprefix(LOCAL)
    footer = _read_footer(file)
    try:
        metadata = pq.read_metadata(pa.BufferReader(footer)).metadata or {}
        report = parse_json(metadata.get(REPORT_KEY, b"{}"))
        check_report(report)
    except (ValueError, pa.ArrowException) as error:
        raise ValueError(
            f"{where} is no shard that can be read: {error}; delete it and run the command again"
        ) from None
    differing = [
        f"{name}: {report['plan'].get(name)} there, {value} given"
        for name, value in plan.facts.items()
        if report["plan"].get(name) != value
    ]
    if differing or report["fingerprint"] != plan.fingerprint:
        raise ValueError(
            f"{where} belongs to other shards ({'; '.join(differing) or 'another format'}); give "
            "another address or folder, or delete those shards"
        )
    return report


def _read_footer(file: StoredFile) -> bytes:
    """Return the end of a parquet file, with all of its footer."""
    size = file.num_bytes
    end = read_bytes(file.address, max(0, size - FOOTER_BYTES), size)
    length = int.from_bytes(end[-8:-4], "little") + 8  # and its length, and the magic bytes
    return read_bytes(file.address, size - length, size) if len(end) < length <= size else end


def _complete(plan: ShardPlan, address: str, files: list[StoredFile]) -> ShardCard:
    """Write report.json, then the card; two processes that do it at once write the same."""
    reports = _read_reports(plan, files)
    images = plan.images
    total = add_reports(reports, images.label_names, images.report.notes)
    if not total["images"]:
        name, why = next(iter(total["unreadable"].items()))
        raise ValueError(f"nothing to prepare: no image can be read, e.g. {name} ({why})")
    sums = [report["latents"] for report in reports if report["latents"]]
    statistics, notes = measure_latents(sums, plan.codec.scale) if plan.codec else (None, [])
    total["notes"] += notes
    codec: dict[str, Any] = {}
    if plan.codec is not None:
        codec = {
            "codec": plan.codec.name,
            "codec_hash": plan.codec.hash,
            "factor": plan.codec.factor,
            "scale": plan.codec.scale,
            "shift": plan.codec.shift,
            "mirror": True,
            "statistics": statistics,
        }
    card = ShardCard(
        kind="latents" if plan.codec else "images",
        size=images.size,
        channels=plan.facts["channels"],
        crop=images.crop,
        form=plan.facts["form"],
        label_names=list(images.label_names) if images.label_names else None,
        plan=plan.fingerprint,
        shards=[
            ShardEntry(
                name=shard_name(k),
                rows=report["rows"],
                bytes=file.num_bytes,
                unreadable=len(report["unreadable"]),
                sha256=report["sha256"],
            )
            for k, (file, report) in enumerate(zip(files, reports, strict=True))
        ],
        captions=_describe_captions(plan, total),
        unlabelled=total["classes"].get("no label", 0),
        left_out=[f"{name} ({why})" for name, why in total["unreadable"].items()][:MAX_LEFT_OUT],
        notes=notes,
        **codec,
    )
    _remove_partials(address)
    text = json.dumps(total, indent=2, ensure_ascii=False) + "\n"
    _write_if_new(join_address(address, REPORT), text)
    _write_if_new(join_address(address, SHARDS_CARD), card.to_json())
    return card


def _describe_captions(plan: ShardPlan, total: dict[str, Any]) -> dict[str, Any] | None:
    """Return the card's facts of the column `tokens`."""
    if plan.encoder is None:
        return None
    return {
        **describe_encoder(plan.encoder),
        "width": plan.encoder.width,
        "max_tokens": plan.encoder.max_tokens,
        "tokens": total["tokens"],
        "longest": total["longest"],
        "captions": total["captions"],
        "cut": total["cut"],
    }


def _write_if_new(address: str, text: str) -> None:
    """Write a file, unless it is there with this content: its version then stays."""
    content = text.encode()
    if stat_file(address) is None or read_bytes(address) != content:
        write_bytes(address, content)


def _remove_partials(address: str) -> None:
    """Remove what killed processes left in a folder; a store shows nothing of it."""
    if address.startswith(LOCAL):
        remove_partials(Path(address.removeprefix(LOCAL)))


def describe_shards(card: ShardCard, report: dict[str, Any], out: str) -> str:
    """Return the number of shards, what they hold and its problems, in lines of text."""
    num_bytes = sum(shard.bytes for shard in card.shards)
    lines = [f"{len(card.shards):,} shards, {format_bytes(num_bytes)}, in {out}"]
    if card.statistics:
        by_channel = ", ".join(
            f"{m:+.3f} ± {d:.3f}"
            for m, d in zip(card.statistics["mean"], card.statistics["std"], strict=True)
        )
        lines.append(f"latents of {card.codec}, mean and deviation by channel: {by_channel}")
    if card.captions:
        cut = f", {card.captions['cut']:,} cut" if card.captions["cut"] else ""
        lines.append(f"captions embedded by {card.captions['encoder']}{cut}")
    return "\n".join([*lines, describe_audit(report)])
