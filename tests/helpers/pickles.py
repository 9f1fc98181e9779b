"""Pickles that would keep a reader busy for ever, alone and in the files of torch.save."""

from __future__ import annotations

import io
import pickle
import zipfile

import torch

from mezzotint.core.pickle_scan import scan_pickle

DOUBLED = b"q\x01h\x01\x86" * 60  # a tuple of the last tuple, twice, sixty times
CALL = b"ccollections\nOrderedDict\n"
BUSY = {
    "key of a dict": b"\x80\x02})" + DOUBLED + b"K\x01s.",
    "keys of a dict": b"\x80\x02}()" + DOUBLED + b"K\x01u.",
    "dict of pairs": b"\x80\x02()" + DOUBLED + b"K\x01d.",
    "set": b"\x80\x04\x8f()" + DOUBLED + b"\x90.",
    "frozenset": b"\x80\x04()" + DOUBLED + b"\x91.",
    "argument": b"\x80\x02" + CALL + b")" + DOUBLED + b"\x85R.",
    "state": b"\x80\x02" + CALL + b")R)" + DOUBLED + b"b.",
    "new object": b"\x80\x02" + CALL + b")" + DOUBLED + b"\x81.",
    "storage": b"\x80\x02)" + DOUBLED + b"Q.",
    "filled later": b"\x80\x02}]q\x05\x85q\x06h\x05)" + DOUBLED + b"a0h\x06K\x01s.",
    "itself": b"\x80\x02}]q\x05h\x05a\x85K\x01s.",
    "deep": b"\x80\x02})" + b"\x85" * 2000 + b"K\x01s.",
}


def as_zip(content: bytes) -> bytes:
    """Return a file as torch.save writes it, with this pickle inside."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
    return file.getvalue()


def as_legacy(content: bytes) -> bytes:
    """Return a file as torch.save wrote it before zips, with this pickle as its contents."""
    file = io.BytesIO()
    torch.save({}, file, _use_new_zipfile_serialization=False)
    file.seek(0)
    for _ in range(3):
        scan_pickle(file)
    return file.getvalue()[: file.tell()] + content + pickle.dumps([], 2)
