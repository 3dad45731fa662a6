"""The project's own rules, as far as no other check holds them."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from peermem.core.errors import PeermemError

ROOT = Path(__file__).resolve().parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCKS = {lock: (ROOT / "requirements" / f"{lock}.txt").read_text() for lock in ("runtime", "image", "lab", "dev")}
NO_LOCK_LINE = r"(?!$| *#|    --hash=sha256:[0-9a-f]{64}( \\)?$|[a-z0-9-]+==[^ ]+( ; [^/]+)? \\$)"


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def names(requirements: list[str]) -> set[str]:
    """Return the distributions that requirements ask for, except this one."""
    found = {normalised(re.split(r"[^A-Za-z0-9._-]", requirement)[0]) for requirement in requirements}
    return found - {"peermem"}


def pins(lock: str) -> dict[str, str]:
    return dict(re.findall(r"^([a-z0-9-]+)==(\S+)", LOCKS[lock], re.MULTILINE))


def sources(*folders: str) -> Iterator[Path]:
    """Yield the Python files that people wrote."""
    for folder in folders:
        yield from (path for path in sorted((ROOT / folder).rglob("*.py")) if "_pb2" not in path.name)


def imported(path: Path) -> Iterator[str]:
    """Yield the modules that a file imports when it runs, not those that only a type checker sees."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    guards = [node for node in nodes if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    unseen = {node for guard in guards for statement in guard.body for node in ast.walk(statement)}
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names if node not in unseen)
        elif isinstance(node, ast.ImportFrom) and node.module and node not in unseen:
            yield node.module.partition(".")[0]


RUNTIME = names(PROJECT["project"]["dependencies"] + PROJECT["project"]["optional-dependencies"]["daemon"])
RUNTIME |= names(PROJECT["project"]["optional-dependencies"]["tool"])
EXTRAS = names(list(chain.from_iterable(PROJECT["project"]["optional-dependencies"].values())))
GROUPS = PROJECT["dependency-groups"]
TEST = names(GROUPS["test"])
DEVELOPMENT = TEST | names([entry for entry in GROUPS["dev"] if entry != {"include-group": "test"}])


def test_the_contract_lists_every_reason_with_its_code() -> None:
    contract = (ROOT / "protos/peermem/v1/error.proto").read_text()
    listed = re.findall(r"// ([A-Z_]+): .*\n(?:  // .*\n)*  ERROR_REASON_(\w+) = ", contract)
    assert {reason: code for code, reason in listed} == {
        reason: fault.code.name for reason, fault in PeermemError.by_reason.items()
    }


def test_every_reason_is_reached_by_a_test() -> None:
    words = {word for path in sources("tests") for word in re.findall(r"\w+", path.read_text())}
    named = {reason: fault.__name__ for reason, fault in PeermemError.by_reason.items()}
    assert [reason for reason, fault in named.items() if not {reason, fault} & words] == []


def test_every_runtime_import_is_a_declared_dependency() -> None:
    modules = set(chain.from_iterable(map(imported, sources("service")))) - sys.stdlib_module_names - {"peermem"}
    owners = packages_distributions()
    modules -= {"pyverbs"}  # the distribution's, of the release of its libibverbs: no registry has a fitting one
    declared = RUNTIME | EXTRAS
    undeclared = {
        module for module in modules if not declared & {normalised(owner) for owner in owners.get(module, ())}
    }
    assert not undeclared


def test_every_dependency_has_its_reason() -> None:
    table = (ROOT / "CONTRIBUTING.md").read_text().partition("## Dependencies")[2].partition("\n## ")[0]
    first_cells = "".join(re.findall(r"^\|[^|]+", table, re.MULTILINE))
    explained = set(re.findall(r"`(.+?)`", first_cells))
    assert explained == RUNTIME | DEVELOPMENT


def test_the_locks_pin_every_dependency_to_the_same_release() -> None:
    assert pins("runtime").keys() >= RUNTIME
    assert pins("dev").keys() >= DEVELOPMENT
    assert pins("lab").keys() >= RUNTIME | TEST
    assert pins("dev").items() >= pins("lab").items() >= pins("runtime").items()
    assert pins("dev").items() >= pins("image").items() >= pins("runtime").items()


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_holds_nothing_but_releases_and_hashes(lock: str) -> None:
    assert [line for line in LOCKS[lock].splitlines() if re.match(NO_LOCK_LINE, line)] == []


def test_no_file_is_long() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in sources("service", "tests", "bench", "deploy")}
    assert {path: length for path, length in lengths.items() if length > 400} == {}
