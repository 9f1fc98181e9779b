"""Reference statistics: ours, and files of ADM, EDM, EDM2, pytorch-fid and clean-fid.

Our format is an .npz with the arrays NAME/mu, NAME/sigma and NAME/features for each feature set,
and `card`, a JSON string with the metadata. Nothing is pickled. The keys of ADM's and EDM2's files
identify them. A file with only mu and sigma may come from any package: give `reference_source`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mezzotint import __version__
from mezzotint.core.files import atomic_write, is_special, sha256_of_file
from mezzotint.core.json_values import check_fields, parse_json
from mezzotint.core.npz_files import npz_names, read_npz, write_npz
from mezzotint.core.rng import philox
from mezzotint.evaluate.features import FeatureSet, compute_features, stream_features
from mezzotint.evaluate.image_source import ImageSource, from_npz, repeat_grey
from mezzotint.evaluate.inception import TAPS
from mezzotint.evaluate.metrics import Gaussian, Moments
from mezzotint.evaluate.safe_pickle import load_arrays

FORMAT = 1
MAX_REFERENCE_BYTES = 2 << 30  # of statistics and features
KEPT_FEATURES = 10_000  # as many real images as ADM's precision and recall use
# Package -> suffix of its feature set's name, which stands for its resize.
REFERENCE_SOURCES = {"adm": "", "edm": "", "pytorch-fid": ":pytorch", "clean-fid": ":clean"}
EDM2_SETS = {"fid": "inception-2048", "fd_dinov2": "dinov2"}  # EDM2's keys -> our feature sets


@dataclass(frozen=True)
class Statistics:
    """Mean, (d,), and covariance, (d, d), of one feature set."""

    mu: np.ndarray
    sigma: np.ndarray

    def gaussian(self) -> Gaussian:
        """Return them with the root of the covariance, for distances."""
        return Gaussian(self.mu, self.sigma)


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Statistics of real images that samples are compared with.

    name: the file. sha256: of its bytes.
    reference_source: "mezzotint", "edm2", "images" (only images), or one of `REFERENCE_SOURCES`.
    statistics: by feature set name.
    features: of some of the images, (n, d), by feature set name; may be empty.
    metadata: how it was made; empty for other packages' files.
    has_images: whether the file holds images, see `complete_reference`.
    """

    name: str
    sha256: str
    reference_source: str
    statistics: dict[str, Statistics] = field(repr=False)
    features: dict[str, np.ndarray] = field(default_factory=dict, repr=False)
    metadata: dict[str, Any] = field(default_factory=dict)
    has_images: bool = False

    @property
    def hash(self) -> str:
        """The first 16 hex digits of `sha256`."""
        return self.sha256[:16]

    def check(self, feature_set: FeatureSet, resolution: tuple[int, int] | None) -> None:
        """Check that features of images of that resolution can be compared with this reference.

        Errors: ValueError for missing statistics, other dimensions, another network or resize, and
        another resolution.
        """
        name = feature_set.name
        if name not in self.statistics and name not in self.features:
            known = ", ".join(sorted({*self.statistics, *self.features}))
            raise ValueError(f"{self.name} has no statistics of {name!r}; it has {known}")
        dims = (
            len(self.statistics[name].mu)
            if name in self.statistics
            else self.features[name].shape[1]
        )
        if dims != feature_set.dims:
            raise ValueError(
                f"{self.name} has {dims} dimensions of {name!r}, the features {feature_set.dims}"
            )
        theirs = self.metadata.get("features", {}).get(name)
        if theirs is not None and theirs != feature_set.metadata():
            lines = [
                f"{k}: {theirs.get(k)} in the reference, {v} now"
                for k, v in feature_set.metadata().items()
                if theirs.get(k) != v
            ]
            raise ValueError(
                f"{self.name} was made with other {name!r} features ({'; '.join(lines)}); make the "
                "reference again"
            )
        size = self.metadata.get("resolution")
        if size is not None and resolution is not None and tuple(size) != tuple(resolution):
            raise ValueError(
                f"{self.name} is of {size[0]} x {size[1]} px images, these are {resolution[0]} x "
                f"{resolution[1]}; make a reference at their resolution"
            )


def make_reference(
    source: ImageSource,
    out: str | Path,
    sets: Sequence[FeatureSet],
    keep: int = KEPT_FEATURES,
    seed: int = 0,
) -> Reference:
    """Compute statistics of all images of `source` in one streaming pass and write them to `out`.

    Args:
        out: a .npz file.
        keep: number of images whose features are kept, for KID, precision, recall and the like.
        seed: of the choice of those images.
    """
    if source.num_images < 2:
        raise ValueError(
            f"{source.name} has {source.num_images} images; a reference needs at least two"
        )
    source = repeat_grey(source, sets[0].channels)
    chosen = np.sort(philox("resample", seed, 0, draw=2).permutation(source.num_images)[:keep])
    totals: dict[str, Moments] = {}
    kept: dict[str, list[np.ndarray]] = {s.name: [] for s in sets}
    done = 0
    for batch in stream_features(sets, source.batches(0, source.num_images)):
        count = len(next(iter(batch.values())))
        rows = chosen[(chosen >= done) & (chosen < done + count)] - done
        for name, features in batch.items():
            moments = Moments.of(features)
            totals[name] = totals[name] + moments if name in totals else moments
            kept[name].append(features.cpu().numpy()[rows])
        done += count
    if done != source.num_images:
        raise ValueError(f"{source.name} gave {done} images instead of {source.num_images}")
    metadata = {
        "mezzotint_reference": FORMAT,
        "source": source.name,
        "identity": source.identity,
        "num_images": source.num_images,
        "resolution": None if source.resolution is None else list(source.resolution),
        **{k: v for k, v in source.metadata.items() if v is not None},
        "kept_seed": seed,
        "features": {s.name: s.metadata() for s in sets},
        "code_version": __version__,
    }
    statistics = {name: _statistics_of(moments) for name, moments in totals.items()}
    features = {k: np.concatenate(v) for k, v in kept.items()} if keep else {}
    if not is_special(Path(out)):
        write_reference(out, statistics, features, metadata)
        return read_reference(out)
    with tempfile.TemporaryDirectory() as folder:  # a device or a pipe cannot be read back
        written = Path(folder) / "reference.npz"
        write_reference(written, statistics, features, metadata)
        atomic_write(Path(out), written.read_bytes())
        return read_reference(written)


def is_reference(path: Path) -> bool:
    """Return whether `make_reference` has written a file."""
    return "card" in npz_names(path) and "mezzotint_reference" in str(
        read_npz(path, ["card"])["card"]
    )


def complete_reference(reference: Reference, sets: Sequence[FeatureSet]) -> Reference:
    """Return `reference` with features of its own images, as ADM's evaluator computes them.

    Statistics of the file are kept (ADM's are of all images, `arr_0` of 10,000); missing ones are
    computed from its images. A reference without images is returned unchanged.
    """
    missing = [s for s in sets if s.name not in reference.features]
    if not reference.has_images or not missing:
        return reference
    source = repeat_grey(from_npz(reference.name), missing[0].channels)
    computed = compute_features(missing, source.batches(0, source.num_images))
    statistics = dict(reference.statistics)
    for name, features in computed.items():
        if name not in statistics:
            statistics[name] = _statistics_of(Moments.of(features))
    return replace(
        reference,
        statistics=statistics,
        features=reference.features | {name: _to_numpy(rows) for name, rows in computed.items()},
        metadata=reference.metadata
        | {"resolution": source.resolution, "images": source.num_images},
    )


def _statistics_of(moments: Moments) -> Statistics:
    return Statistics(_to_numpy(moments.mean), _to_numpy(moments.cov))


def _to_numpy(tensor: Tensor) -> np.ndarray:
    return tensor.cpu().numpy()


def write_reference(
    path: str | Path,
    statistics: Mapping[str, Statistics],
    features: Mapping[str, np.ndarray],
    metadata: Mapping[str, Any],
) -> None:
    """Write our format; see the module."""
    arrays: dict[str, np.ndarray] = {"card": np.array(json.dumps(metadata))}
    for name, s in statistics.items():
        arrays |= {f"{name}/mu": s.mu, f"{name}/sigma": s.sigma}
    write_npz(Path(path), arrays | {f"{name}/features": rows for name, rows in features.items()})


def read_reference(path: str | Path, reference_source: str | None = None) -> Reference:
    """Read a reference of ours, ADM, EDM, EDM2, pytorch-fid or clean-fid; no code in it is run.

    Args:
        reference_source: which of `REFERENCE_SOURCES` wrote the file; needed for one with only mu
            and sigma (or clean-fid's feats).

    Errors: ValueError for a damaged file, pickled objects, unknown arrays, or wrong shapes.
    """
    path = Path(path)
    if reference_source is not None and reference_source not in REFERENCE_SOURCES:
        raise ValueError(
            f"unknown reference source {reference_source!r}; choose from "
            f"{', '.join(REFERENCE_SOURCES)}"
        )
    if path.is_dir():
        raise ValueError(
            f"{path} is a folder; a reference is a file of statistics. Make one with mezzotint "
            f"reference {path} ref.npz (--size resizes the images)"
        )
    sha256 = sha256_of_file(path)

    def build(reference_source: str, statistics: dict[str, Statistics], **rest: Any) -> Reference:
        return Reference(
            name=str(path),
            sha256=sha256,
            reference_source=reference_source,
            statistics=statistics,
            **rest,
        )

    if path.suffix.lower() == ".pkl":
        return build("edm2", _read_edm2(path))
    names = npz_names(path)
    has_images = "arr_0" in names
    others = [name for name in names if not name.startswith("arr_")]
    arrays = read_npz(path, others, MAX_REFERENCE_BYTES)
    if "card" in arrays:
        statistics, features, metadata = _parse_own(path, arrays)
        return build("mezzotint", statistics, features=features, metadata=metadata)
    if {"mu_s", "sigma_s"} <= arrays.keys():  # only ADM stores sFID's statistics
        reference_source = "adm"
    if reference_source is None and not arrays and has_images:
        return build("images", {}, has_images=True)
    if reference_source is None:
        raise ValueError(
            f"{path} holds {', '.join(sorted(arrays)) or 'no arrays'}, and the resize behind them "
            f"is unknown; set --reference-source to one of {', '.join(REFERENCE_SOURCES)}"
        )
    statistics, features = _parse_other(path, arrays, reference_source)
    return build(reference_source, statistics, features=features, has_images=has_images)


def _parse_own(
    path: Path, arrays: Mapping[str, np.ndarray]
) -> tuple[dict[str, Statistics], dict[str, np.ndarray], dict[str, Any]]:
    """Return statistics, features and metadata of our format."""
    try:
        metadata = parse_json(str(arrays["card"]))
        check_fields({"card": metadata}, {"card": dict})
        check_fields(metadata, {"features": dict[str, dict], "mezzotint_reference": int})
    except ValueError as error:
        raise ValueError(f"{path}: its metadata is damaged ({error})") from None
    names, version = list(metadata["features"]), metadata["mezzotint_reference"]
    if version != FORMAT:
        raise ValueError(
            f"{path} has format {version}, this version reads {FORMAT}; make the reference again"
        )
    statistics = {
        name: _check_statistics(path, arrays, f"{name}/mu", f"{name}/sigma") for name in names
    }
    features = {
        name: _check_rows(path, arrays[f"{name}/features"])
        for name in names
        if f"{name}/features" in arrays
    }
    return statistics, features, metadata


def _parse_other(
    path: Path, arrays: Mapping[str, np.ndarray], reference_source: str
) -> tuple[dict[str, Statistics], dict[str, np.ndarray]]:
    """Return statistics and features of an .npz of another package."""
    statistics: dict[str, Statistics] = {}
    for suffix in ("", "_s"):
        if f"mu{suffix}" in arrays:
            s = _check_statistics(path, arrays, f"mu{suffix}", f"sigma{suffix}")
            name = _feature_set_name(path, reference_source, len(s.mu), sfid=suffix == "_s")
            statistics[name] = s
    features: dict[str, np.ndarray] = {}
    if "feats" in arrays:
        rows = _check_rows(path, arrays["feats"])
        features[_feature_set_name(path, reference_source, rows.shape[-1])] = rows
    if not statistics and not features:
        raise ValueError(
            f"{path} holds {', '.join(sorted(arrays)) or 'nothing'}; expected mu and sigma"
        )
    return statistics, features


def _read_edm2(path: Path) -> dict[str, Statistics]:
    stored = load_arrays(path)
    if not isinstance(stored, dict) or not set(stored) & set(EDM2_SETS):
        raise ValueError(
            f"{path} has none of the keys {', '.join(EDM2_SETS)}; is it a reference of EDM2?"
        )
    return {
        name: _check_statistics(path, stored[key], "mu", "sigma")
        for key, name in EDM2_SETS.items()
        if key in stored
    }


def _check_statistics(
    path: Path, arrays: Mapping[str, np.ndarray], mu_key: str, sigma_key: str
) -> Statistics:
    """Return the two arrays as `Statistics`; ValueError if one is missing or of a wrong shape."""
    if not isinstance(arrays, Mapping) or sigma_key not in arrays or mu_key not in arrays:
        raise ValueError(f"{path} has only one of {mu_key} and {sigma_key}")
    for key in (mu_key, sigma_key):
        if not isinstance(arrays[key], np.ndarray) or arrays[key].dtype.kind not in "fiu":
            raise ValueError(f"{path}: {key} is no array of numbers")
    mu, sigma = (np.asarray(arrays[key], np.float64) for key in (mu_key, sigma_key))
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise ValueError(
            f"{path}: {mu_key} of shape {mu.shape} does not fit {sigma_key} of shape {sigma.shape}"
        )
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise ValueError(f"{path}: {mu_key} or {sigma_key} holds NaN or infinity")
    return Statistics(mu, sigma)


def _check_rows(path: Path, rows: np.ndarray) -> np.ndarray:
    """Return the features of images, one row each; ValueError for any other array."""
    if rows.ndim != 2 or rows.dtype.kind != "f" or not np.isfinite(rows).all():
        raise ValueError(
            f"{path}: features are rows of finite numbers, not {rows.dtype} of shape {rows.shape}"
        )
    return rows


def _feature_set_name(path: Path, reference_source: str, dims: int, sfid: bool = False) -> str:
    """Return the name of the Inception feature set with that many dimensions."""
    taps = {size: tap for tap, size in TAPS.items() if (tap == "sfid") == sfid and tap != "logits"}
    if dims not in taps:
        raise ValueError(
            f"{path} has {dims} dimensions; files of {reference_source} have "
            f"{', '.join(map(str, taps))}"
        )
    return f"inception-{taps[dims]}{REFERENCE_SOURCES[reference_source]}"
