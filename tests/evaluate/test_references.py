"""Reference files: ours, those of other packages, damaged and unsafe ones."""

from __future__ import annotations

import io
import pickle

import numpy as np
import pytest
import torch

from mezzotint.data.image_dataset import open_images
from mezzotint.data.prepare import prepare_source
from mezzotint.evaluate.features import NETWORK_BATCH, from_module
from mezzotint.evaluate.image_source import from_samples, open_image_source, open_real_images
from mezzotint.evaluate.metrics import frechet_distance
from mezzotint.evaluate.references import (
    Reference,
    Statistics,
    complete_reference,
    make_reference,
    read_reference,
)
from mezzotint.evaluate.safe_pickle import load_arrays


def random_images(n, size=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, size, size), generator=generator, dtype=torch.uint8)


def random_source(n=75):
    x = random_images(n)
    metadata = {"seeds": f"0...{n - 1}"}
    return from_samples(lambda indices: x[list(indices)], n, "random", metadata, "0", batch=10)


def feature_set(scale=1.0, dims=5):
    """Return the features "own" of a small network; another scale has other weights."""

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.conv = torch.nn.Conv2d(3, dims, 3)
            self.conv.bias.data += scale

        def forward(self, x):
            return self.conv(x).relu().mean((2, 3))

    return from_module(Net(), name="own", dims=dims, size=12)


def random_statistics(dims, seed=0):
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(dims, dims))
    return Statistics(rng.normal(size=dims), a @ a.T)


# --- our references -------------------------------------------------------------------------------


def test_a_reference_has_the_mean_covariance_and_kept_features(tmp_path):
    s, x = feature_set(), random_images(75)
    reference = make_reference(random_source(), tmp_path / "r.npz", [s], keep=20)
    features = s(x).double().numpy()
    statistics = reference.statistics["own"]
    np.testing.assert_allclose(statistics.mu, features.mean(0), rtol=1e-12)
    np.testing.assert_allclose(statistics.sigma, np.cov(features.T), rtol=1e-10, atol=1e-14)
    kept = reference.features["own"]
    assert kept.shape == (20, 5)
    matches = [np.flatnonzero((features.astype(np.float32) == row).all(1)) for row in kept]
    assert all(len(m) == 1 for m in matches)
    indices = [m[0] for m in matches]
    assert indices == sorted(indices)
    assert reference.metadata["num_images"] == 75
    assert reference.metadata["seeds"] == "0...74"
    assert reference.metadata["features"]["own"] == s.metadata()


def test_the_same_images_give_the_same_file(tmp_path):
    first = make_reference(random_source(), tmp_path / "a.npz", [feature_set()], keep=20)
    second = make_reference(random_source(), tmp_path / "b.npz", [feature_set()], keep=20)
    assert first.sha256 == second.sha256
    assert not make_reference(random_source(), tmp_path / "c.npz", [feature_set()], keep=0).features
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npz", "b.npz", "c.npz"]


def test_a_folder_is_refused_with_the_command_that_makes_a_reference(tmp_path):
    with pytest.raises(ValueError, match=rf"mezzotint reference {tmp_path} "):
        read_reference(tmp_path)


def test_prepared_datasets_are_read_at_their_own_size(tmp_path):
    prepare_source("shapes:count=12", tmp_path / "set", 16, progress=False)
    source = open_image_source(tmp_path / "set")
    assert (source.num_images, source.resolution) == (12, (16, 16))
    assert source.metadata["preprocessing"] == "crop adm to 16 px"
    stored = open_images(tmp_path / "set").batch(range(12))[0]
    assert torch.cat(list(source.batches(0, 12))).equal(stored)
    assert open_image_source(f"{tmp_path / 'set'}:test").num_images < 12
    images = open_real_images(str(tmp_path / "set"), None)
    reference = make_reference(images, tmp_path / "ref.npz", [feature_set()])
    assert reference.metadata["num_images"] == 12
    assert reference.metadata["resolution"] == [16, 16]
    reference.check(feature_set(), (16, 16))
    assert open_real_images(str(tmp_path / "set"), 8).resolution == (8, 8)


def test_references_that_do_not_fit_are_refused(tmp_path):
    reference = make_reference(random_source(), tmp_path / "r.npz", [feature_set()])
    reference.check(feature_set(), (12, 12))
    with pytest.raises(ValueError, match="weights"):
        reference.check(feature_set(scale=2.0), (12, 12))
    with pytest.raises(ValueError, match=r"'other'.* own"):
        reference.check(from_module(torch.nn.Flatten(), name="other", dims=3), (12, 12))
    common = {"name": "r", "sha256": "", "reference_source": "mezzotint"}
    large = Reference(**common, statistics=reference.statistics, metadata={"resolution": [64, 64]})
    with pytest.raises(ValueError, match=r"64 x 64.* 12 x 12"):
        large.check(feature_set(), (12, 12))
    short = Reference(**common, statistics={"own": random_statistics(4)})
    with pytest.raises(ValueError, match="4 dimensions"):
        short.check(feature_set(), (12, 12))
    with pytest.raises(ValueError, match="1 images"):
        make_reference(random_source(1), tmp_path / "one.npz", [feature_set()])


# --- references of other packages -----------------------------------------------------------------


@pytest.fixture
def inception_statistics():
    """Random statistics of the feature sets in other packages' files."""
    rng = np.random.default_rng(0)
    names = {"inception-2048": 2048, "inception-sfid": 2023, "dinov2": 1024}
    return {
        name: Statistics(rng.normal(size=d), np.diag(rng.uniform(size=d)))
        for name, d in names.items()
    }


def test_adm_files_hold_fid_sfid_and_images(inception_statistics, tmp_path):
    fid, sfid = inception_statistics["inception-2048"], inception_statistics["inception-sfid"]
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    np.savez(
        tmp_path / "adm.npz", images, mu=fid.mu, sigma=fid.sigma, mu_s=sfid.mu, sigma_s=sfid.sigma
    )
    reference = read_reference(tmp_path / "adm.npz")
    assert reference.reference_source == "adm"
    assert reference.has_images
    assert set(reference.statistics) == {"inception-2048", "inception-sfid"}
    for name, statistics in reference.statistics.items():
        np.testing.assert_array_equal(statistics.mu, inception_statistics[name].mu)
        np.testing.assert_array_equal(statistics.sigma, inception_statistics[name].sigma)


@pytest.mark.parametrize(
    ("package", "suffix"), [("edm", ""), ("pytorch-fid", ":pytorch"), ("clean-fid", ":clean")]
)
def test_files_of_mu_and_sigma_need_their_source(package, suffix, tmp_path):
    np.savez(tmp_path / "f.npz", mu=np.zeros(2048), sigma=np.eye(2048, dtype=np.float32))
    with pytest.raises(ValueError, match="--reference-source"):
        read_reference(tmp_path / "f.npz")
    statistics = read_reference(tmp_path / "f.npz", package).statistics
    assert list(statistics) == [f"inception-2048{suffix}"]
    assert statistics[f"inception-2048{suffix}"].sigma.dtype == np.float64
    np.savez(tmp_path / "small.npz", mu=np.zeros(768), sigma=np.eye(768))
    assert list(read_reference(tmp_path / "small.npz", package).statistics) == [
        f"inception-768{suffix}"
    ]


def test_clean_fid_features_for_kid(tmp_path):
    rows = np.random.default_rng(0).normal(size=(6, 2048)).astype(np.float32)
    np.savez(tmp_path / "kid.npz", feats=rows)
    reference = read_reference(tmp_path / "kid.npz", "clean-fid")
    np.testing.assert_array_equal(reference.features["inception-2048:clean"], rows)


@pytest.mark.parametrize("protocol", range(6))
def test_edm2_pickles_of_every_protocol(inception_statistics, tmp_path, protocol):
    fid, dinov2 = inception_statistics["inception-2048"], inception_statistics["dinov2"]
    stored = {
        "fid": {"mu": fid.mu, "sigma": np.asfortranarray(fid.sigma)},
        "fd_dinov2": {"mu": dinov2.mu.astype(">f4"), "sigma": dinov2.sigma},
    }
    (tmp_path / "ref.pkl").write_bytes(pickle.dumps(stored, protocol))
    statistics = read_reference(tmp_path / "ref.pkl").statistics
    assert set(statistics) == {"inception-2048", "dinov2"}
    np.testing.assert_array_equal(statistics["inception-2048"].sigma, fid.sigma)
    np.testing.assert_allclose(statistics["dinov2"].mu, dinov2.mu, rtol=1e-7)


def test_a_distance_to_a_file_is_that_to_its_statistics(tmp_path):
    a, b = random_statistics(64), random_statistics(64, seed=1)
    np.savez(tmp_path / "r.npz", mu=a.mu, sigma=a.sigma)
    loaded = read_reference(tmp_path / "r.npz", "edm").statistics["inception-64"]
    expected = frechet_distance(a.mu, a.sigma, b.mu, b.sigma)
    assert loaded.gaussian().distance(b.gaussian()) == pytest.approx(expected, rel=1e-12)


def test_a_file_of_images_is_completed_with_their_statistics(tmp_path):
    x, s = random_images(NETWORK_BATCH + 3), feature_set()
    np.savez(tmp_path / "images.npz", x.permute(0, 2, 3, 1).numpy())
    images_only = read_reference(tmp_path / "images.npz")
    assert (images_only.reference_source, images_only.statistics) == ("images", {})
    complete = complete_reference(images_only, [s])
    np.testing.assert_array_equal(complete.features["own"], s(x).numpy())
    covariance = np.cov(s(x).double().numpy().T)
    sigma = complete.statistics["own"].sigma
    np.testing.assert_allclose(sigma, covariance, rtol=1e-10, atol=1e-14)
    assert complete.metadata["resolution"] == (12, 12)
    assert complete_reference(complete, [s]) is complete


def test_a_file_s_own_statistics_are_kept(tmp_path):
    """ADM's statistics are of all images, its arr_0 only of 10,000."""
    x, own = random_images(5), random_statistics(5)
    np.savez(tmp_path / "images.npz", x.permute(0, 2, 3, 1).numpy())
    reference = Reference(
        name=str(tmp_path / "images.npz"),
        sha256="",
        reference_source="adm",
        statistics={"own": own},
        has_images=True,
    )
    complete = complete_reference(reference, [feature_set()])
    assert complete.statistics["own"] is own
    assert complete.features["own"].shape == (5, 5)


def test_unknown_reference_sources_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"'tf'.*edm"):
        read_reference(tmp_path / "own.npz", "tf")


# --- damaged and unsafe files ---------------------------------------------------------------------


class RunsCode:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code was run')",))


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (RunsCode(), r"builtin.*\.exec"),
        ({"fid": {"mu": np.array([1, "a"], dtype=object), "sigma": 1}}, "dtype 'O8'|dtype 'O'"),
        ({"fid": io.BytesIO}, r"_io\.BytesIO"),
        ({"a": {1, 2}}, r"a set|builtin.*\.set"),
        (np.array(["a"]), "dtype 'U1'"),
    ],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_pickles_of_other_things_than_arrays_are_refused(tmp_path, content, named, protocol):
    (tmp_path / "bad.pkl").write_bytes(pickle.dumps(content, protocol))
    with pytest.raises(ValueError, match=named):
        load_arrays(tmp_path / "bad.pkl")


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.99])
def test_truncated_pickles_are_refused(tmp_path, share):
    content = pickle.dumps({"fid": {"mu": np.zeros(4), "sigma": np.eye(4)}})
    (tmp_path / "cut.pkl").write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"cut\.pkl"):
        load_arrays(tmp_path / "cut.pkl")


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"mu": np.zeros(3)}, "fid, fd_dinov2"),
        ({"fid": {"mu": np.zeros(3)}}, "only one of mu and sigma"),
    ],
)
def test_pickles_without_statistics_are_refused(tmp_path, content, named):
    (tmp_path / "other.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=named):
        read_reference(tmp_path / "other.pkl")


def test_pickled_scalars_and_strings_are_plain(tmp_path):
    stored = {"n": np.float64(3.5), "name": "x", "list": [1, None, True, np.int32(4)]}
    (tmp_path / "s.pkl").write_bytes(pickle.dumps(stored))
    assert load_arrays(tmp_path / "s.pkl") == {"n": 3.5, "name": "x", "list": [1, None, True, 4]}


@pytest.fixture
def npz(tmp_path):
    """Return the path of an intact reference as ADM writes it."""
    path = tmp_path / "f.npz"
    np.savez(path, mu=np.zeros(2048), sigma=np.eye(2048), mu_s=np.zeros(2023), sigma_s=np.eye(2023))
    return path


def test_truncated_npz_files_are_refused(npz):
    content = npz.read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"not a zip"):
        npz.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"f\.npz"):
            read_reference(npz)


def test_a_flipped_bit_in_an_npz_file_is_found(npz):
    content = bytearray(npz.read_bytes())
    content[100_000] ^= 255
    npz.write_bytes(content)
    with pytest.raises(ValueError, match="CRC"):
        read_reference(npz)


def test_npz_files_with_pickled_objects_are_refused(npz):
    np.savez(npz, mu=np.array([RunsCode()], dtype=object), sigma=np.eye(1))
    with pytest.raises(ValueError, match="pickled objects"):
        read_reference(npz, "edm")


def test_files_that_are_not_npz_or_missing_are_refused(npz, tmp_path):
    with open(npz, "wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(ValueError, match=r"f\.npz"):
        read_reference(npz)
    with pytest.raises(ValueError, match=r"absent\.npz"):
        read_reference(tmp_path / "absent.npz")


@pytest.mark.parametrize(
    ("arrays", "named"),
    [
        ({"mu": np.zeros(2048)}, "only one of mu and sigma"),
        ({"mu": np.zeros(2048), "sigma": np.eye(5)}, r"\(2048,\).*\(5, 5\)"),
        ({"mu": np.full(64, np.nan), "sigma": np.eye(64)}, "NaN"),
        ({"mu": np.zeros(100), "sigma": np.eye(100)}, "100 dimensions"),
        ({"other": np.zeros(3)}, "other"),
        ({"card": np.array("{}")}, "it has no 'features'"),
        ({"card": np.array('{"mezzotint_reference": 9, "features": {}}')}, "format 9"),
    ],
)
def test_npz_files_of_wrong_content_are_refused(tmp_path, arrays, named):
    np.savez(tmp_path / "f.npz", **arrays)
    with pytest.raises(ValueError, match=named):
        read_reference(tmp_path / "f.npz", "edm")
