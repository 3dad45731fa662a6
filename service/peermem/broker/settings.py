"""What the configuration says about the broker."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Settings:
    """What the configuration says about the broker; times in seconds."""

    node: str
    rails: int
    max_regions: int
    max_running: int
    max_segments: int
    keep_ended: int
    keep_ended_for: float
    grant_ttl: float
    link_idle: float
    retry_for: float
