"""Variants are found by being there, and misspelt ones are answered with their neighbours."""

import importlib
import shutil
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import jaxtyping
import pytest

from mezzotint.core.registry import Registry, Spec, build


@pytest.fixture
def package(tmp_path, monkeypatch):
    folder = tmp_path / "variants_for_test"
    folder.mkdir()
    (folder / "__init__.py").write_text(
        "from mezzotint.core.registry import Registry\nregistry = Registry('variant', __name__)\n"
    )
    (folder / "one.py").write_text(
        textwrap.dedent("""
        from variants_for_test import registry
        @registry.register('one')
        def one(*, width=1): return width
        """)
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield folder
    for name in [m for m in sys.modules if m.startswith("variants_for_test")]:
        del sys.modules[name]


def load() -> Registry:
    import variants_for_test

    return variants_for_test.registry


def test_a_new_file_is_found_by_the_scan(package):
    (package / "two.py").write_text(
        "from variants_for_test import registry\nregistry.add('two', lambda: 2)\n"
    )
    assert list(load()) == ["one", "two"]


def test_an_unknown_name_lists_its_neighbours(package):
    with pytest.raises(ValueError, match="unknown variant 'onne'; did you mean one"):
        load()["onne"]


def test_a_name_taken_twice_is_an_error(package):
    (package / "three.py").write_text(
        "from variants_for_test import registry\nregistry.add('one', 3)\n"
    )
    with pytest.raises(ValueError, match="registered twice"):
        list(load())


def test_a_scan_that_failed_is_made_again(package):
    last = package / "zzz.py"
    last.write_text("from variants_for_test import registry\nregistry.add('last', 1)\n1 / 0\n")
    registry = load()
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            list(registry)
    last.write_text("from variants_for_test import registry\nregistry.add('last', 2)\n")
    importlib.invalidate_caches()
    shutil.rmtree(package / "__pycache__", ignore_errors=True)
    assert list(registry) == ["last", "one"]
    assert registry["last"] == 2


def test_threads_that_look_up_at_once_all_find(package):
    (package / "slow.py").write_text(
        "import time\nfrom variants_for_test import registry\ntime.sleep(0.2)\n"
        "registry.add('slow', 3)\n"
    )
    registry = load()
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: registry["slow"], range(4))) == [3] * 4


def test_a_module_that_fails_to_import_fails_the_scan(package):
    (package / "broken.py").write_text("import no_such_module_anywhere\n")
    with pytest.raises(ModuleNotFoundError):
        list(load())


def test_options_are_checked_by_name(package):
    assert build(load(), Spec("one", {"width": 3})) == 3
    with pytest.raises(ValueError, match="takes no option 'widht'; did you mean width"):
        build(load(), Spec("one", {"widht": 3}))


@pytest.mark.parametrize("name", [None, 3, ["one"], {}])
def test_what_is_no_name_is_refused(package, monkeypatch, name):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match="is not a name; known: one"):
        load()[name]
