"""What figures depend on."""

from __future__ import annotations

import os
import platform


def machine() -> str:
    """Return what the figures depend on, and nothing that names this machine."""
    kernel = ".".join(platform.release().split(".")[:2])
    processor = f"{os.cpu_count()} cores ({platform.machine()})"
    return f"{processor}, {platform.system()} {kernel}, Python {platform.python_version()}"
