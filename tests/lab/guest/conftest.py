"""What every test in the guest can ask for."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Figures = Callable[[str, Any], None]


@pytest.fixture(scope="session")
def out() -> Path:
    """Return the suite's folder, all of which comes out of the guest."""
    return Path(os.environ["PEERMEM_LAB_OUT"])


@pytest.fixture(scope="session")
def figures(out: Path) -> Figures:
    """Return what writes figures into the lab's report: `figures("write_64KiB", {"mib_per_s": 71.0})`."""

    def write(name: str, figure: Any) -> None:
        (out / f"{name}.json").write_text(json.dumps(figure, indent=2))

    return write


@pytest.fixture(scope="session")
def soak_share() -> float:
    """Return how much of a soak to do: 1.0, or 0.1 in an ordinary run of the lab."""
    return float(os.environ["PEERMEM_LAB_SOAK"])
