"""Configuration files for tests, and what is wrong with them."""

from __future__ import annotations

from pathlib import Path

import pytest

from peermem.config import ConfigError, load


def write(folder: Path, text: str) -> Path:
    file = folder / "peermem.toml"
    file.write_text(text)
    return file


def problems(file: Path | None, environ: dict[str, str] | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(file, environ or {})
    assert str(caught.value) == "\n".join(caught.value.problems)
    return list(caught.value.problems)
