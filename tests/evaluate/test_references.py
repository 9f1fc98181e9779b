"""Reference files: every format there and back, ours with its card, nothing that could run, damage named."""

from __future__ import annotations

import io
import pickle
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from mezzotint.data.image_dataset import open_images
from mezzotint.data.prepare import prepare_source
from mezzotint.evaluate.features import NETWORK_BATCH, from_module
from mezzotint.evaluate.image_source import (
    from_folder,
    from_npz,
    from_samples,
    open_image_source,
    open_real_images,
)
from mezzotint.evaluate.metrics import frechet_distance
from mezzotint.evaluate.references import (
    Reference,
    Statistics,
    complete_reference,
    export,
    make_reference,
    read_reference,
    write_reference,
)
from mezzotint.evaluate.safe_pickle import load_arrays


def pictures(n, size=12, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, size, size), generator=g, dtype=torch.uint8)


def source(n=75, seed=0, name="pictures"):
    x = pictures(n, seed=seed)
    return from_samples(
        lambda numbers: x[list(numbers)],
        n,
        name,
        {"seeds": f"0...{n - 1}"},
        identity=f"{seed}",
        batch=10,
    )


def own(scale=1.0, dims=5):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.conv = torch.nn.Conv2d(3, dims, 3)

        def forward(self, x):
            return scale * self.conv(x).relu().mean((2, 3))

    net = Net()
    net.conv.bias.data += scale  # so that another scale is another hash
    return from_module(net, name="own", dims=dims, size=12)


def gaussian(d, seed=0, n=None):
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(d, d))
    return Statistics(rng.normal(size=d), a @ a.T, n)


@pytest.fixture
def inception_like(tmp_path):
    """A reference with the sets that other libraries' files hold, of small random numbers where size is free."""
    names = {"inception-2048": 2048, "inception-sfid": 2023, "dinov2": 1024}
    rng = np.random.default_rng(0)
    statistics = {
        k: Statistics(rng.normal(size=d), np.diag(rng.uniform(size=d)), 9) for k, d in names.items()
    }
    card = {"mezzotint_reference": 1, "n": 9, "features": {name: {} for name in names}}
    write_reference(tmp_path / "own.npz", statistics, {}, card)
    return read_reference(tmp_path / "own.npz")


# --- ours -----------------------------------------------------------------------------------------------------------


def test_a_reference_is_the_statistics_of_its_images(tmp_path):
    s, x = own(), pictures(75)
    made = make_reference(source(), tmp_path / "r.npz", [s], keep=20)
    features = s(x).double().numpy()
    np.testing.assert_allclose(made.statistics["own"].mu, features.mean(0), rtol=1e-12)
    np.testing.assert_allclose(
        made.statistics["own"].sigma, np.cov(features.T), rtol=1e-10, atol=1e-14
    )
    kept = made.features["own"]
    assert kept.shape == (20, 5)
    rows = [np.flatnonzero((features.astype(np.float32) == row).all(1)) for row in kept]
    assert all(len(r) == 1 for r in rows)
    assert sorted(r[0] for r in rows) == [r[0] for r in rows]
    assert made.info["n"] == 75
    assert made.info["seeds"] == "0...74"
    assert made.info["features"]["own"] == s.card()
    again = make_reference(source(), tmp_path / "r.npz", [s], keep=20)
    assert again.sha256 == made.sha256
    assert not make_reference(source(), tmp_path / "none.npz", [s], keep=0).features
    assert not list(tmp_path.glob("*.part"))


def test_a_folder_is_no_reference_but_makes_one(tmp_path):
    with pytest.raises(ValueError, match=rf"is a folder.*--make-reference {tmp_path} ref\.npz"):
        read_reference(tmp_path)


def test_prepared_sets_are_read_at_their_own_size(tmp_path):
    prepare_source("shapes:count=12", tmp_path / "set", 16, progress=False)
    found = open_image_source(tmp_path / "set")
    assert (found.n, found.resolution, found.card["preprocessing"]) == (
        12,
        (16, 16),
        "crop adm to 16 px",
    )
    stored = open_images(tmp_path / "set").batch(range(12))[0]
    assert torch.cat(list(found.batches(0, 12))).equal(stored)
    assert open_image_source(f"{tmp_path / 'set'}:test").n < 12
    made = make_reference(
        open_real_images(str(tmp_path / "set"), None), tmp_path / "ref.npz", [own()]
    )
    assert (made.info["n"], made.info["resolution"]) == (12, [16, 16])
    made.check(own(), (16, 16))
    assert open_real_images(str(tmp_path / "set"), 8).resolution == (8, 8)


def test_latents_are_no_pictures(tmp_path):
    (tmp_path / "latents.json").write_text("{}")
    for size in (None, 16):
        with pytest.raises(
            ValueError, match="holds latents, not pictures; give the pictures it was prepared from"
        ):
            open_real_images(str(tmp_path), size)


def test_what_does_not_fit_is_refused(tmp_path):
    made = make_reference(source(), tmp_path / "r.npz", [own()])
    made.check(own(), (12, 12))
    with pytest.raises(ValueError, match=r"made with other 'own' features \(weights:"):
        made.check(own(scale=2.0), (12, 12))
    with pytest.raises(ValueError, match="no statistics of 'other'; it has own"):
        made.check(from_module(torch.nn.Flatten(), name="other", dims=3), (12, 12))
    sized = Reference(
        name="r",
        sha256="",
        maker="mezzotint",
        statistics=made.statistics,
        card={"resolution": [64, 64]},
    )
    with pytest.raises(ValueError, match="64 x 64 px images, these are 12 x 12"):
        sized.check(own(), (12, 12))
    short = Reference(name="r", sha256="", maker="adm", statistics={"own": gaussian(4)})
    with pytest.raises(ValueError, match="4 dimensions"):
        short.check(own(), (12, 12))
    with pytest.raises(ValueError, match="at least two"):
        make_reference(source(1), tmp_path / "one.npz", [own()])


# --- theirs ---------------------------------------------------------------------------------------------------------


def test_adm_there_and_back(inception_like, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    export(inception_like, tmp_path / "adm.npz", "adm", images)
    with np.load(tmp_path / "adm.npz") as file:
        assert set(file.files) == {"mu", "sigma", "mu_s", "sigma_s", "arr_0"}
    back = read_reference(tmp_path / "adm.npz")
    assert back.maker == "adm"
    assert back.images
    assert set(back.statistics) == {"inception-2048", "inception-sfid"}
    for name, found in back.statistics.items():
        np.testing.assert_array_equal(found.sigma, inception_like.statistics[name].sigma)
        assert found.n is None


@pytest.mark.parametrize(
    ("maker", "suffix"), [("edm", ""), ("pytorch-fid", ":pytorch"), ("clean-fid", ":clean")]
)
def test_bare_moments_need_their_maker(maker, suffix, inception_like, tmp_path):
    np.savez(tmp_path / "f.npz", mu=np.zeros(2048), sigma=np.eye(2048, dtype=np.float32))
    with pytest.raises(ValueError, match="mu, sigma but does not say how they were made"):
        read_reference(tmp_path / "f.npz")
    back = read_reference(tmp_path / "f.npz", maker)
    assert list(back.statistics) == [f"inception-2048{suffix}"]
    assert back.statistics[f"inception-2048{suffix}"].sigma.dtype == np.float64
    np.savez(tmp_path / "small.npz", mu=np.zeros(768), sigma=np.eye(768))
    assert list(read_reference(tmp_path / "small.npz", maker).statistics) == [
        f"inception-768{suffix}"
    ]
    named = Reference(name="r", sha256="", maker="mezzotint", statistics=back.statistics)
    export(named, tmp_path / "back.npz", maker)
    with np.load(tmp_path / "back.npz") as file:
        assert set(file.files) == {"mu", "sigma"}
    if suffix:
        with pytest.raises(ValueError, match=f"files hold inception-2048{suffix}"):
            export(inception_like, tmp_path / "x.npz", maker)


def test_clean_fid_features_for_kid(tmp_path):
    rows = np.random.default_rng(0).normal(size=(6, 2048)).astype(np.float32)
    np.savez(tmp_path / "kid.npz", feats=rows)
    back = read_reference(tmp_path / "kid.npz", "clean-fid")
    np.testing.assert_array_equal(back.features["inception-2048:clean"], rows)


@pytest.mark.parametrize("protocol", range(6))
def test_edm2_pickles_there_and_back(inception_like, tmp_path, protocol):
    stats = {
        k: {"mu": s.mu, "sigma": np.asfortranarray(s.sigma)}
        for k, s in inception_like.statistics.items()
    }
    stored = {
        "fid": stats["inception-2048"],
        "fd_dinov2": stats["dinov2"] | {"mu": stats["dinov2"]["mu"].astype(">f4")},
    }
    (tmp_path / "ref.pkl").write_bytes(pickle.dumps(stored, protocol))
    back = read_reference(tmp_path / "ref.pkl")
    assert set(back.statistics) == {"inception-2048", "dinov2"}
    np.testing.assert_array_equal(
        back.statistics["inception-2048"].sigma, stats["inception-2048"]["sigma"]
    )
    np.testing.assert_allclose(back.statistics["dinov2"].mu, stats["dinov2"]["mu"], rtol=1e-7)


def test_edm2_export_is_read_by_plain_pickle(inception_like, tmp_path):
    export(inception_like, tmp_path / "out.pkl", "edm2")
    stored = pickle.loads((tmp_path / "out.pkl").read_bytes())
    np.testing.assert_array_equal(
        stored["fid"]["mu"], inception_like.statistics["inception-2048"].mu
    )
    assert set(read_reference(tmp_path / "out.pkl").statistics) == {"inception-2048", "dinov2"}


def test_distances_do_not_change_with_the_file(tmp_path):
    a, b = gaussian(64), gaussian(64, 1)
    np.savez(tmp_path / "r.npz", mu=a.mu, sigma=a.sigma)
    back = read_reference(tmp_path / "r.npz", "edm").statistics["inception-64"]
    want = frechet_distance(a.mu, a.sigma, b.mu, b.sigma)
    assert back.gaussian().distance(b.gaussian()) == pytest.approx(want, rel=1e-12)


def test_images_alone_or_beside_statistics_are_a_reference(tmp_path):
    x = pictures(NETWORK_BATCH + 3)
    np.savez(tmp_path / "images.npz", x.permute(0, 2, 3, 1).numpy())
    bare = read_reference(tmp_path / "images.npz")
    assert (bare.maker, bare.statistics) == ("images", {})
    s = own()
    full = complete_reference(bare, [s])
    np.testing.assert_array_equal(full.features["own"], s(x).numpy())
    np.testing.assert_allclose(
        full.statistics["own"].sigma, np.cov(s(x).double().numpy().T), rtol=1e-10, atol=1e-14
    )
    assert full.info["resolution"] == (12, 12)
    assert complete_reference(full, [s]) is full
    given = Reference(
        name=bare.name, sha256="", maker="adm", statistics={"own": gaussian(5)}, images=True
    )
    assert complete_reference(given, [s]).statistics["own"] is given.statistics["own"]


# --- what must not be read ------------------------------------------------------------------------------------------


class Runs:
    def __reduce__(self):
        return (exec, ("raise SystemExit('it ran')",))


@pytest.mark.parametrize(
    ("thing", "words"),
    [
        (Runs(), r"builtin.*\.exec"),
        ({"fid": {"mu": np.array([1, "a"], dtype=object), "sigma": 1}}, "dtype 'O8'|dtype 'O'"),
        ({"fid": io.BytesIO}, r"_io\.BytesIO"),
        ({"a": {1, 2}}, r"a set|builtin.*\.set"),
        (np.array(["a"]), "dtype 'U1'"),
    ],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_pickles_that_are_more_than_arrays_are_refused(tmp_path, thing, words, protocol):
    (tmp_path / "bad.pkl").write_bytes(pickle.dumps(thing, protocol))
    with pytest.raises(ValueError, match=words):
        load_arrays(tmp_path / "bad.pkl")


def test_damaged_pickles_are_said_to_be(tmp_path):
    good = pickle.dumps({"fid": {"mu": np.zeros(4), "sigma": np.eye(4)}})
    for cut in (0, 10, len(good) // 2, len(good) - 1):
        (tmp_path / "cut.pkl").write_bytes(good[:cut])
        with pytest.raises(ValueError, match=r"cut\.pkl"):
            load_arrays(tmp_path / "cut.pkl")
    (tmp_path / "other.pkl").write_bytes(pickle.dumps({"mu": np.zeros(3)}))
    with pytest.raises(ValueError, match="none of the keys fid, fd_dinov2"):
        read_reference(tmp_path / "other.pkl")
    (tmp_path / "half.pkl").write_bytes(pickle.dumps({"fid": {"mu": np.zeros(3)}}))
    with pytest.raises(ValueError, match="only one of mu and sigma"):
        read_reference(tmp_path / "half.pkl")


def test_pickled_scalars_and_strings_are_plain(tmp_path):
    stored = {"n": np.float64(3.5), "name": "x", "list": [1, None, True, np.int32(4)]}
    (tmp_path / "s.pkl").write_bytes(pickle.dumps(stored))
    assert load_arrays(tmp_path / "s.pkl") == {"n": 3.5, "name": "x", "list": [1, None, True, 4]}


def test_damaged_npz_are_said_to_be(tmp_path):
    path = tmp_path / "f.npz"
    np.savez(path, mu=np.zeros(2048), sigma=np.eye(2048), mu_s=np.zeros(2023), sigma_s=np.eye(2023))
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"not a zip"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"f\.npz"):
            read_reference(path)
    flipped = bytearray(whole)
    flipped[100_000] ^= 255
    path.write_bytes(flipped)
    with pytest.raises(ValueError, match="CRC"):
        read_reference(path)
    np.savez(path, mu=np.array([Runs()], dtype=object), sigma=np.eye(1))
    with pytest.raises(ValueError, match="pickled objects; refused"):
        read_reference(path, "edm")
    with open(path, "wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(ValueError, match=r"no whole \.npz"):
        read_reference(path)
    with pytest.raises(ValueError, match="cannot be read"):
        read_reference(tmp_path / "absent.npz")


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"mu": np.zeros(2048)}, "only one of mu and sigma"),
        ({"mu": np.zeros(2048), "sigma": np.eye(5)}, "do not fit together"),
        ({"mu": np.full(64, np.nan), "sigma": np.eye(64)}, "NaN"),
        ({"mu": np.zeros(100), "sigma": np.eye(100)}, "100 dimensions; edm files have 64"),
        ({"other": np.zeros(3)}, "expected mu and sigma"),
        ({"card": np.array("{}")}, "card is damaged"),
        ({"card": np.array('{"mezzotint_reference": 9, "n": 3, "features": {}}')}, "format 9"),
    ],
)
def test_files_of_the_wrong_content_are_refused(tmp_path, arrays, words):
    np.savez(tmp_path / "f.npz", **arrays)
    with pytest.raises(ValueError, match=words):
        read_reference(tmp_path / "f.npz", "edm")


def test_options_are_checked(inception_like, tmp_path):
    with pytest.raises(ValueError, match="maker 'tf'"):
        read_reference(tmp_path / "own.npz", "tf")
    with pytest.raises(ValueError, match="maker 'tf'"):
        export(inception_like, tmp_path / "x.npz", "tf")
    with pytest.raises(ValueError, match="hold no images"):
        export(inception_like, tmp_path / "x.npz", "edm", np.zeros((2, 4, 4, 3), np.uint8))


# --- sources --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compressed", [False, True])
def test_sample_files_are_read_in_pieces(tmp_path, compressed):
    x = pictures(130)
    (np.savez_compressed if compressed else np.savez)(
        tmp_path / "s.npz", x.permute(0, 2, 3, 1).numpy(), np.arange(130)
    )
    found = from_npz(tmp_path / "s.npz")
    assert (found.n, found.resolution) == (130, (12, 12))
    assert torch.cat(list(found.batches(0, 130))).equal(x)
    assert torch.cat(list(found.batches(65, 71))).equal(x[65:71])
    grey = np.zeros((3, 4, 4, 1), np.uint8)
    np.savez(tmp_path / "g.npz", grey)
    assert next(iter(from_npz(tmp_path / "g.npz").batches(0, 3))).shape == (3, 1, 4, 4)


def test_bad_sample_files_are_refused(tmp_path):
    for array, words in [
        (np.zeros((3, 4, 4, 3), np.float32), "float32"),
        (np.zeros((3, 3, 4, 4), np.uint8), "expected uint8"),
        (np.array([{}], dtype=object), "pickled objects"),
    ]:
        np.savez(tmp_path / "s.npz", array)
        with pytest.raises(ValueError, match=words):
            from_npz(tmp_path / "s.npz")
    np.savez(tmp_path / "s.npz", other=np.zeros(3))
    with pytest.raises(ValueError, match="no array 'arr_0'"):
        from_npz(tmp_path / "s.npz")
    np.savez(tmp_path / "s.npz", np.zeros((64, 16, 16, 3), np.uint8))
    with zipfile.ZipFile(tmp_path / "s.npz") as z:
        member = z.read("arr_0.npy")
    with zipfile.ZipFile(tmp_path / "s.npz", "w") as z:
        z.writestr("arr_0.npy", member[:-100])
    with pytest.raises(ValueError, match="damaged"):
        list(from_npz(tmp_path / "s.npz").batches(0, 64))


def test_folders_are_read_untouched(tmp_path):
    x = pictures(5)
    for i, image in enumerate(x):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{i:03d}.png")
    found = open_image_source(tmp_path)
    assert (found.n, found.resolution) == (5, (12, 12))
    assert torch.cat(list(found.batches(0, 5))).equal(x)
    assert torch.cat(list(found.batches(2, 4))).equal(x[2:4])
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as z:
        for file in sorted(tmp_path.glob("*.png")):
            z.write(file, file.name)
    assert torch.cat(list(open_image_source(tmp_path / "z.zip").batches(0, 5))).equal(x)
    opaque = Image.fromarray(x[0].permute(1, 2, 0).numpy()).convert("RGBA")
    opaque.save(tmp_path / "000.png")
    assert torch.cat(list(from_folder(tmp_path).batches(0, 1))).equal(x[:1])
    opaque.putalpha(100)
    opaque.save(tmp_path / "000.png")
    with pytest.raises(ValueError, match="mode RGBA"):
        list(from_folder(tmp_path).batches(0, 1))


@pytest.mark.parametrize(
    ("second", "words"),
    [
        (Image.new("RGB", (12, 13)), r"12 x 13 pixels.*one size"),
        (Image.new("L", (12, 12)), "mode L.*convert grey"),
    ],
)
def test_folders_of_unlike_images_are_refused(tmp_path, second, words):
    Image.new("RGB", (12, 12)).save(tmp_path / "a.png")
    second.save(tmp_path / "b.png")
    with pytest.raises(ValueError, match=words):
        list(from_folder(tmp_path).batches(0, 2))


def test_folders_of_nothing_are_refused(tmp_path):
    Image.new("RGB", (12, 12)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="holds 1 images; at least two"):
        from_folder(tmp_path)
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "b.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"b\.png"):
        list(from_folder(tmp_path).batches(0, 2))
    with pytest.raises(ValueError, match="no images at"):
        open_image_source(tmp_path / "a.png")
