"""Reference statistics: ours with their card, and those of ADM, EDM, EDM2, pytorch-fid and clean-fid.

Ours is an .npz with the arrays NAME/mu, NAME/sigma and NAME/features for each feature set and one string `card` in
JSON; nothing pickled. Of the others, only ADM's and EDM2's say by their keys what they are; a bare mu and sigma could
be of any package, so the reader must be told.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mezzotint import __version__
from mezzotint.core.files import sha256_of_file
from mezzotint.core.rng import philox
from mezzotint.evaluate.features import FeatureSet, compute_features, stream
from mezzotint.evaluate.image_source import ImageSource, from_npz, npz_names, read_npz
from mezzotint.evaluate.inception import TAPS
from mezzotint.evaluate.metrics import Gaussian, Moments
from mezzotint.evaluate.safe_pickle import load_arrays

FORMAT = 1
KEPT_FEATURES = 10_000  # as many real images as ADM's precision and recall use
# Whose a file of bare moments may be -> the suffix of the feature set's name, which is its resize.
REFERENCE_SOURCES = {"adm": "", "edm": "", "pytorch-fid": ":pytorch", "clean-fid": ":clean"}


@dataclass(frozen=True)
class Statistics:
    """Mean and covariance of one feature set. n: images behind them, None where a file does not say."""

    mu: np.ndarray
    sigma: np.ndarray
    n: int | None = None

    def gaussian(self) -> Gaussian:
        """For distances."""
        return Gaussian(self.mu, self.sigma, self.n)


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What samples are measured against.

    name: the file. sha256: of its bytes. maker: "mezzotint", "edm2", "images" (nothing else) or of `MAKERS`.
    statistics: by feature set name. features: rows of some images, (n, d), by feature set name; maybe none.
    card: how it was made, empty for other libraries' files. images: the file has sample images, see `completed`.
    """

    name: str
    sha256: str
    maker: str
    statistics: dict[str, Statistics] = field(repr=False)
    features: dict[str, np.ndarray] = field(default_factory=dict, repr=False)
    card: dict[str, Any] = field(default_factory=dict)
    images: bool = False

    @property
    def hash(self) -> str:
        """The first 16 hex digits of `sha256`."""
        return self.sha256[:16]

    def check(self, s: FeatureSet, resolution: tuple[int, int] | None) -> None:
        """ValueError unless this reference can be compared with features `s` of images of that resolution."""
        if s.name not in self.statistics and s.name not in self.features:
            have = ", ".join(sorted({*self.statistics, *self.features}))
            raise ValueError(f"{self.name} has no statistics of {s.name!r}; it has {have}")
        dims = (
            len(self.statistics[s.name].mu)
            if s.name in self.statistics
            else self.features[s.name].shape[1]
        )
        if dims != s.dims:
            raise ValueError(
                f"{self.name} has {dims} dimensions of {s.name!r}, the features {s.dims}"
            )
        theirs = self.card.get("features", {}).get(s.name)
        if theirs is not None and theirs != s.card():
            lines = [
                f"{k}: {theirs.get(k)} there, {v} here"
                for k, v in s.card().items()
                if theirs.get(k) != v
            ]
            raise ValueError(
                f"{self.name} was made with other {s.name!r} features ({'; '.join(lines)}); make it anew"
            )
        made_at = self.card.get("resolution")
        if made_at is not None and resolution is not None and tuple(made_at) != tuple(resolution):
            raise ValueError(
                f"{self.name} is of {made_at[0]} x {made_at[1]} px images, these are {resolution[0]} x "
                f"{resolution[1]}; make a reference at their resolution"
            )


def make_reference(
    source: ImageSource,
    out: str | Path,
    sets: Sequence[FeatureSet],
    keep: int = KEPT_FEATURES,
    seed: int = 0,
) -> Reference:
    """Statistics of every image of `source`, written to `out` (.npz) with their card; streaming, in one pass.

    Args:
        sets: feature sets to take. keep: rows of features to keep for KID, precision and the like, drawn by `seed`.
    """
    if source.n < 2:
        raise ValueError(f"{source.name} has {source.n} images; a reference needs at least two")
    chosen = np.sort(philox("resample", seed, 0, draw=2).permutation(source.n)[:keep])
    totals: dict[str, Moments] = {}
    kept: dict[str, list[np.ndarray]] = {s.name: [] for s in sets}
    done = 0
    resolution = source.resolution
    for found in stream(sets, source.batches(0, source.n)):
        rows = len(next(iter(found.values())))
        local = chosen[(chosen >= done) & (chosen < done + rows)] - done
        for name, features in found.items():
            moments = Moments.of(features)
            totals[name] = totals[name] + moments if name in totals else moments
            kept[name].append(features.cpu().numpy()[local])
        done += rows
    if done != source.n:
        raise ValueError(f"{source.name} gave {done} images, it promised {source.n}")
    card = {
        "mezzotint_reference": FORMAT,
        "source": source.name,
        "identity": source.identity,
        "n": source.n,
        "resolution": None if resolution is None else list(resolution),
        **{k: v for k, v in source.card.items() if v is not None},
        "kept_seed": seed,
        "features": {s.name: s.card() for s in sets},
        "code_version": __version__,
    }
    statistics = {
        name: Statistics(_array(m.mean), _array(m.cov), m.n) for name, m in totals.items()
    }
    write_reference(
        out, statistics, {k: np.concatenate(v) for k, v in kept.items()} if keep else {}, card
    )
    return read_reference(out)


def complete_reference(reference: Reference, sets: Sequence[FeatureSet]) -> Reference:
    """`reference` with features of its own sample images, for precision, recall and the like, as ADM's evaluator does.

    Statistics it has are kept (ADM's are of all images, `arr_0` of 10,000); missing ones are taken from those images.
    Unchanged when the file holds no images.
    """
    wanted = [s for s in sets if s.name not in reference.features]
    if not reference.images or not wanted:
        return reference
    source = from_npz(reference.name)
    found = compute_features(wanted, source.batches(0, source.n))
    statistics = dict(reference.statistics)
    for s in wanted:
        if s.name not in statistics:
            moments = Moments.of(found[s.name])
            statistics[s.name] = Statistics(_array(moments.mean), _array(moments.cov), moments.n)
    card = {**reference.card, "resolution": source.resolution, "images": source.n}
    features = {**reference.features, **{name: _array(rows) for name, rows in found.items()}}
    return replace(reference, statistics=statistics, features=features, card=card)


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.cpu().numpy()


def _save(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """An .npz that appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    with open(part, "wb") as file:
        np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]
    part.replace(path)


def write_reference(
    path: str | Path,
    statistics: Mapping[str, Statistics],
    features: Mapping[str, np.ndarray],
    card: Mapping[str, Any],
) -> None:
    """Our format; see the module."""
    arrays: dict[str, np.ndarray] = {"card": np.array(json.dumps(card))}
    for name, s in statistics.items():
        arrays |= {f"{name}/mu": s.mu, f"{name}/sigma": s.sigma}
    _save(Path(path), arrays | {f"{name}/features": rows for name, rows in features.items()})


def export(
    reference: Reference, path: str | Path, maker: str, images: np.ndarray | None = None
) -> None:
    """Write another library's file.

    Args:
        maker: "adm" (mu, sigma, mu_s, sigma_s, and arr_0 if `images` are given), "edm", "pytorch-fid", "clean-fid" (mu,
            sigma) or "edm2" (.pkl). ValueError when the reference has not the features that library uses.
        images: uint8 (n, h, w, 3), for "adm" only.
    """
    if maker not in (*REFERENCE_SOURCES, "edm2"):
        raise ValueError(f"maker {maker!r}; allowed: {', '.join(REFERENCE_SOURCES)}, edm2")
    if images is not None and maker != "adm":
        raise ValueError(f"{maker} files hold no images; leave them out")
    names = {"": f"inception-2048{REFERENCE_SOURCES.get(maker, '')}"}
    if maker == "adm":
        names["_s"] = "inception-sfid"
    if maker == "edm2":
        names = {
            k: v
            for k, v in {"fid": "inception-2048", "fd_dinov2": "dinov2"}.items()
            if v in reference.statistics
        }
    missing = [name for name in names.values() if name not in reference.statistics]
    if missing or not names:
        have = ", ".join(reference.statistics)
        raise ValueError(
            f"{maker} files hold {', '.join(missing) or 'inception-2048 or dinov2'}; {reference.name} has {have}"
        )
    found = {key: reference.statistics[name] for key, name in names.items()}
    if maker == "edm2":
        with open(path, "wb") as file:
            pickle.dump({key: {"mu": s.mu, "sigma": s.sigma} for key, s in found.items()}, file)
        return
    arrays = {f"mu{key}": s.mu for key, s in found.items()} | {
        f"sigma{key}": s.sigma for key, s in found.items()
    }
    _save(Path(path), arrays if images is None else arrays | {"arr_0": images})


def read_reference(path: str | Path, maker: str | None = None) -> Reference:
    """A reference file of ours, ADM's, EDM's, EDM2's, pytorch-fid's or clean-fid's; nothing in it is ever run.

    Args:
        maker: of `MAKERS`, whose a file with only mu and sigma (or clean-fid's feats) is; the file cannot say.

    Errors: ValueError for a damaged file, pickled objects, unknown arrays, and shapes that do not fit.
    """
    path = Path(path)
    if maker is not None and maker not in REFERENCE_SOURCES:
        raise ValueError(f"maker {maker!r}; allowed: {', '.join(REFERENCE_SOURCES)}")
    if path.is_dir():
        raise ValueError(
            f"{path} is a folder; a reference is a file of statistics: mezzotint evaluate --make-reference {path} "
            "ref.npz makes it (--size resizes the pictures)"
        )
    sha256 = sha256_of_file(path)
    if path.suffix == ".pkl":
        return Reference(name=str(path), sha256=sha256, maker="edm2", statistics=_edm2(path))
    names = npz_names(path)
    images = "arr_0" in names
    arrays = read_npz(path, [name for name in names if not name.startswith("arr_")])
    if "card" in arrays:
        statistics, features, card = _ours(path, arrays)
        return Reference(
            name=str(path),
            sha256=sha256,
            maker="mezzotint",
            statistics=statistics,
            features=features,
            card=card,
        )
    if {"mu_s", "sigma_s"} <= arrays.keys():
        maker = "adm"
    if maker is None and not arrays and images:
        return Reference(name=str(path), sha256=sha256, maker="images", statistics={}, images=True)
    if maker is None:
        raise ValueError(
            f"{path} holds {', '.join(sorted(arrays)) or 'no arrays'} but does not say how they were made; "
            f"state the maker: {', '.join(REFERENCE_SOURCES)} (their resizes differ)"
        )
    statistics: dict[str, Statistics] = {}
    for key in ("", "_s"):
        if f"mu{key}" in arrays:
            found = _statistics(path, arrays, f"mu{key}", f"sigma{key}")
            statistics[_set_name(path, maker, len(found.mu), sfid=key == "_s")] = found
    features = {
        _set_name(path, maker, rows.shape[-1]): rows
        for key, rows in arrays.items()
        if key == "feats"
    }
    if not statistics and not features:
        raise ValueError(
            f"{path} holds {', '.join(sorted(arrays)) or 'nothing'}; expected mu and sigma"
        )
    return Reference(
        name=str(path),
        sha256=sha256,
        maker=maker,
        statistics=statistics,
        features=features,
        images=images,
    )


def _statistics(
    path: Path, arrays: Mapping[str, np.ndarray], mu: str, sigma: str, n: int | None = None
) -> Statistics:
    if sigma not in arrays or mu not in arrays:
        raise ValueError(f"{path} has only one of {mu} and {sigma}")
    a, b = (np.asarray(arrays[key], np.float64) for key in (mu, sigma))
    if a.ndim != 1 or b.shape != (len(a), len(a)):
        raise ValueError(
            f"{path}: {mu} of shape {a.shape} and {sigma} of shape {b.shape} do not fit together"
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError(f"{path}: {mu} or {sigma} holds NaN or infinity")
    return Statistics(a, b, n)


def _set_name(path: Path, maker: str, dims: int, sfid: bool = False) -> str:
    known = {size: tap for tap, size in TAPS.items() if (tap == "sfid") == sfid and tap != "logits"}
    if dims not in known:
        raise ValueError(
            f"{path} has {dims} dimensions; {maker} files have {', '.join(map(str, known))}"
        )
    return f"inception-{known[dims]}{REFERENCE_SOURCES[maker]}"


def _ours(path: Path, arrays: Mapping[str, np.ndarray]):
    try:
        card = json.loads(str(arrays["card"]))
        names, n, version = list(card["features"]), int(card["n"]), card["mezzotint_reference"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: its card is damaged ({error!r})") from error
    if version != FORMAT:
        raise ValueError(
            f"{path} is of format {version}, this version reads {FORMAT}; make it anew"
        )
    statistics = {
        name: _statistics(path, arrays, f"{name}/mu", f"{name}/sigma", n) for name in names
    }
    features = {name: arrays[f"{name}/features"] for name in names if f"{name}/features" in arrays}
    return statistics, features, card


def _edm2(path: Path) -> dict[str, Statistics]:
    names = {"fid": "inception-2048", "fd_dinov2": "dinov2"}
    stored = load_arrays(path)
    if not isinstance(stored, dict) or not set(stored) & set(names):
        raise ValueError(
            f"{path} has none of the keys {', '.join(names)}; is it an EDM2 reference?"
        )
    return {
        names[key]: _statistics(path, stored[key], "mu", "sigma") for key in names if key in stored
    }
