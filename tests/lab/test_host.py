from __future__ import annotations

from dataclasses import replace

import pytest

from tests.lab.host import Host, lack

GOOD = Host(root=True, machine="x86_64", distribution="debian", release="12", missing=())


@pytest.mark.parametrize("release", ["12", "13"])
def test_a_debian_with_everything_lacks_nothing(release: str) -> None:
    assert lack(replace(GOOD, release=release)) is None


def test_missing_packages_come_with_the_command_that_installs_them() -> None:
    told = lack(replace(GOOD, missing=("cpio", "seabios")))
    assert told is not None
    assert "apt-get install --no-install-recommends cpio seabios" in told


@pytest.mark.parametrize(
    ("host", "word"),
    [
        (replace(GOOD, root=False), "root"),
        (replace(GOOD, machine="aarch64"), "aarch64"),
        (replace(GOOD, release="11"), "debian 11"),
        (replace(GOOD, distribution="ubuntu", release="24.04"), "ubuntu 24.04"),
        (replace(GOOD, distribution="", release=""), "not known"),
    ],
)
def test_what_is_wrong_is_one_sentence(host: Host, word: str) -> None:
    told = lack(host)
    assert told is not None
    assert word in told
    assert "\n" not in told
