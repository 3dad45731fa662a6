"""The policy's file: strict TOML into rules, or everything that is wrong with it.

Rules of this file:

* A file that could mean less than its author wrote is refused: unknown keys, patterns that match nothing, a right that
  its rule gives no object for, a file without a rule, such as one that is just being written.
* The file's words are the core's: rights are its actions, limits its resources.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from msgspec import Meta, Struct, field

from peermem import strict_toml
from peermem.core.patterns import DevicePattern, Folder, OwnerPattern, SubjectPattern
from peermem.core.policy import FILES, Action, Rule, Rules, TenantRule
from peermem.core.quota import Limits
from peermem.core.units import parse_size
from peermem.strict_toml import ConfigError, Contradiction

_MOST = 1 << 20
"""Bytes of a file."""


class RuleName(str):
    """What a rule or tenant is called in logs and errors."""

    __slots__ = ()
    expected: ClassVar[str] = "a name of 1 to 63 of a-z, A-Z, 0-9, _, . and -"

    def __new__(cls, text: str) -> Self:
        """Raises ValueError."""
        if (
            not 1 <= len(text) <= 63
            or not text.isascii()
            or not text.replace("_", "a").replace(".", "a").replace("-", "a").isalnum()
        ):
            raise ValueError(cls.expected)
        return super().__new__(cls, text)


class Text(str):
    """A label's value."""

    __slots__ = ()
    expected: ClassVar[str] = "a text"


class Bytes(int):
    """A limit in bytes."""

    expected: ClassVar[str] = 'a size up to 1024TiB in bytes, KiB, MiB, GiB or TiB, such as "64GiB"'

    def __new__(cls, value: str | int) -> Self:
        """Raises ValueError."""
        if isinstance(value, bool) or not isinstance(value, (str, int)):
            raise ValueError(cls.expected)
        size = parse_size(value)
        if not 0 <= size <= 1 << 50:
            raise ValueError(cls.expected)
        return super().__new__(cls, size)


class Rate(Bytes):
    """A limit in bytes a second."""

    expected: ClassVar[str] = 'a size from 1MiB to 1024TiB in bytes, KiB, MiB, GiB or TiB, such as "1GiB"'

    def __new__(cls, value: str | int) -> Self:
        """Raises ValueError."""
        size = super().__new__(cls, value)
        if size < 1 << 20:  # slices are as large: less would be no rate, but long pauses
            raise ValueError(cls.expected)
        return size


Count = Annotated[int, Meta(ge=0, le=1 << 24)]
PerSecond = Annotated[int, Meta(ge=1, le=1 << 24)]


class RuleTable(Struct, frozen=True, forbid_unknown_fields=True):
    """A `[[rule]]`."""

    name: RuleName
    subjects: tuple[SubjectPattern, ...]
    rights: tuple[Literal["read", "write", "manage", "create", "load", "store"], ...]
    owners: tuple[OwnerPattern, ...] = ()
    labels: Mapping[Text, Text] = {}
    devices: tuple[DevicePattern, ...] = ()
    files: tuple[Folder, ...] = ()


class TenantTable(Struct, frozen=True, forbid_unknown_fields=True):
    """A `[[tenant]]`."""

    name: RuleName
    subjects: tuple[SubjectPattern, ...]
    each: bool = False
    weight: Annotated[int, Meta(ge=1, le=100)] = 1
    regions: Count | None = None
    bytes: Bytes | None = None
    transfers: Count | None = None
    outstanding: Bytes | None = None
    bytes_per_second: Rate | None = None
    requests_per_second: PerSecond | None = None


class PolicyTable(Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file."""

    root: bool = True
    rules: tuple[RuleTable, ...] = field(default=(), name="rule")
    tenants: tuple[TenantTable, ...] = field(default=(), name="tenant")


def read(path: Path) -> Rules:
    """Return the policy in a file. Raises ConfigError with a sentence for each thing that is wrong."""
    try:
        if path.stat().st_size > _MOST:
            raise ConfigError([f"{path}: it has more than {_MOST} bytes, which no policy needs. Name the right file."])
        table = strict_toml.read_file(path)
    except FileNotFoundError:
        raise ConfigError([f"{path}: there is no such file. Write the policy there, or name another file."]) from None
    except OSError as error:
        raise ConfigError([f"{path}: it can't be read: {error.strerror}."]) from error
    return rules(strict_toml.build(PolicyTable, table, path, {}, "PEERMEM_", _contradictions), str(path))


def rules(table: PolicyTable, source: str) -> Rules:
    """Return what a valid table means."""
    return Rules(
        tuple(
            Rule(
                each.name,
                each.subjects,
                frozenset(map(Action, each.rights)),
                each.owners,
                {str(key): str(value) for key, value in each.labels.items()},
                each.devices,
                each.files,
            )
            for each in table.rules
        ),
        tuple(
            TenantRule(
                each.name,
                each.subjects,
                Limits(
                    each.regions,
                    each.bytes,
                    each.transfers,
                    each.outstanding,
                    each.bytes_per_second,
                    each.requests_per_second,
                ),
                each.weight,
                each.each,
            )
            for each in table.tenants
        ),
        table.root,
        source=source,
    )


def _contradictions(table: PolicyTable) -> Iterator[Contradiction]:
    """Yield what is wrong between values that are valid one by one."""
    if not table.rules:
        yield "rule", "rule is missing: a policy needs at least one [[rule]], else nobody could reach anything."
    sections: dict[str, Sequence[RuleTable | TenantTable]] = {"rule": table.rules, "tenant": table.tenants}
    for section, entries in sections.items():
        names = [entry.name for entry in entries]
        for name in sorted({name for name in names if names.count(name) > 1}):
            yield section, f'{section} has the name "{name}" more than once. Give each its own.'
        for index, entry in enumerate(entries):
            if not entry.subjects:
                yield section, f"{section}[{index}].subjects is empty, so that it is for nobody. Name some subjects."
    for index, rule in enumerate(table.rules):
        about_files = not FILES.isdisjoint(map(Action, rule.rights))
        if not rule.rights:
            yield "rule", f"rule[{index}].rights is empty, so that it gives nothing. Name some rights."
        if about_files and not rule.files:
            yield "rule", f'rule[{index}].files is empty, while its rights have "load" or "store". Name directories.'
        if rule.files and not about_files:
            yield "rule", f'rule[{index}].files is set, while its rights have neither "load" nor "store". Add one.'
