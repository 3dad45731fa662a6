from __future__ import annotations

import pytest

from peermem.client import targets
from peermem.core.errors import InvalidField


@pytest.mark.parametrize(
    "target", ["unix:///run/x.sock", "localhost:7470", "10.0.0.1:7470", "[::1]:7470", "node-1.example:1"]
)
def test_targets_are_sockets_and_addresses(target: str) -> None:
    assert targets.resolve(target) == target


@pytest.mark.parametrize("target", ["nope", "unix:relative", "unix://", "http://x:1", "x:", ":7470", "x:1/2"])
def test_other_targets_are_refused(target: str) -> None:
    with pytest.raises(InvalidField, match="unix:///PATH or HOST:PORT"):
        targets.resolve(target)


def test_the_environment_comes_before_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PEERMEM_TARGET", raising=False)
    assert targets.resolve(None) == "unix:///run/peermem/peermem.sock"
    monkeypatch.setenv("PEERMEM_TARGET", "a:1")
    assert targets.resolve(None) == "a:1"
    assert targets.resolve("b:2") == "b:2"


def test_the_attach_socket_is_beside_a_local_daemon() -> None:
    assert targets.attach_path("unix:///run/peermem/peermem.sock") == "/run/peermem/attach.sock"
    assert targets.attach_path("localhost:7470") is None
