"""What all tests share: no test depends on how fast the machine is."""

from __future__ import annotations

from hypothesis import settings

from tests import fuzzing

settings.register_profile("peermem", deadline=None)
settings.load_profile("peermem")


def pytest_sessionfinish() -> None:
    """See pytest: tell how much was fuzzed."""
    fuzzing.report()
