"""What all tests share: no test depends on how fast the machine is."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("peermem", deadline=None)
settings.load_profile("peermem")
