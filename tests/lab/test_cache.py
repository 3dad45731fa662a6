from __future__ import annotations

from pathlib import Path

import pytest

from tests.lab.cache import Cache


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def test_a_folder_is_built_once(cache: Cache) -> None:
    built: list[Path] = []
    with cache.locked():
        first = cache.get("part", ("a",), built.append)
        assert cache.get("part", ("a",), built.append) == first
    assert len(built) == 1


def test_another_input_makes_another_folder_and_removes_the_old_one(cache: Cache) -> None:
    with cache.locked():
        old = cache.get("part", ("a",), lambda _: None)
        other = cache.get("part-b", ("a",), lambda _: None)
        new = cache.get("part", ("b",), lambda _: None)
    assert new.exists()
    assert other.exists()
    assert not old.exists()


def test_inputs_do_not_run_together(cache: Cache) -> None:
    with cache.locked():
        assert cache.get("part", ("ab", "c"), lambda _: None) != cache.get("part", ("a", "bc"), lambda _: None)


def test_a_build_that_fails_leaves_nothing_to_use(cache: Cache, tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").touch()
        raise OSError("no space left")

    with cache.locked():
        old = cache.get("part", ("a",), lambda _: None)
        with pytest.raises(OSError, match="no space"):
            cache.get("part", ("b",), fail)
    with cache.locked():
        assert [path.name for path in (tmp_path / "cache").iterdir() if path.is_dir()] == [old.name]
        assert list(cache.get("part", ("b",), lambda _: None).iterdir()) == []
