"""Commands about policy files: whether one is right, and which of its rules decides.

Rules of this file:

* The file is read as a daemon reads it, here; a daemon is asked only for the facts of a region that is named.
"""

from __future__ import annotations

from pathlib import Path

import click

from peermem import policy_file
from peermem.cli import output, parsing
from peermem.cli.options import pass_settings
from peermem.cli.settings import Settings
from peermem.core.identity import Subject
from peermem.core.patterns import SubjectPattern
from peermem.core.policy import FILES, Action, Decision, Rules, Traits
from peermem.core.quota import Resource
from peermem.core.units import format_size
from peermem.strict_toml import ConfigError

_DENIED = 5
_SIZES = (Resource.BYTES, Resource.OUTSTANDING, Resource.BYTES_PER_SECOND)


@click.group()
def policy() -> None:
    """Check a policy file, and ask which of its rules decides."""


@policy.command()
@click.argument("file", type=click.Path(path_type=Path))
@pass_settings
def check(settings: Settings, file: Path) -> None:
    """Check the policy FILE; the exit code is 1 when something is wrong with it."""
    try:
        rules = policy_file.read(file)
    except ConfigError as error:
        if settings.json:
            output.print_json({"file": str(file), "valid": False, "problems": error.problems})
        else:
            for problem in error.problems:
                click.echo(f"error: {problem}", err=True)
        raise click.exceptions.Exit(1) from None
    names = {"rules": [rule.name for rule in rules.rules], "tenants": [tenant.name for tenant in rules.tenants]}
    if settings.json:
        output.print_json({"file": str(file), "valid": True, "problems": [], **names})
    else:
        output.print_facts({"file": file, **names, "root of this host": "everything" if rules.root else "by the rules"})


class _Subject(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.4 on only
    """A subject with its groups, and the node that vouches for it."""

    name = "subject"

    def convert(self, value: str | Subject, param: click.Parameter | None, ctx: click.Context | None) -> Subject:
        """Return the subject."""
        if isinstance(value, Subject):
            return value
        try:
            spoken = Subject.parse_spoken(value if "@" in value else f"{value}@here")
            if not SubjectPattern(spoken.name).is_one:
                raise ValueError(value)
        except ValueError:
            self.fail(f"{value!r} is no subject, such as uid:1000,gid:100 or uid:1000@b.", param, ctx)
        return spoken if "@" in value else Subject(spoken.name, spoken.groups)


@policy.command()
@click.argument("subject", type=_Subject())
@click.argument("action", type=click.Choice([action.value for action in Action]))
@click.argument("region", default="", shell_complete=parsing.complete_regions)
@click.option("--file", required=True, type=click.Path(path_type=Path), help="The policy file.")
@click.option("--owner", default="", metavar="SUBJECT", help="Whose region; without REGION. Default: SUBJECT's own.")
@click.option("--device", default="", shell_complete=parsing.complete_devices, help="On which device; without REGION.")
@click.option("--label", "labels", multiple=True, callback=parsing.labels, help="KEY=VALUE of it; may be repeated.")
@click.option("--path", default="", help="Of the file to load or store.")
@pass_settings
def explain(
    settings: Settings,
    subject: Subject,
    action: str,
    region: str,
    file: Path,
    owner: str,
    device: str,
    labels: dict[str, str],
    path: str,
) -> None:
    """Tell which rule decides whether SUBJECT may do ACTION with REGION, and whose limits hold.

    REGION is one of the daemon's; without it, the options say what it is like. A load or store needs --path: it is
    about the file, and needs the right to write or read the region as well. The exit code is 5 when it is denied.
    """
    try:
        rules = policy_file.read(file)
    except ConfigError as error:
        raise click.UsageError("\n".join(error.problems)) from None
    if (Action(action) in FILES) is not bool(path):
        raise click.UsageError("A load or store needs --path, and nothing else takes it.")
    traits = _traits(settings, region) if region else Traits(owner or str(subject), device, labels)
    decision = _decide(rules, subject, Action(action), traits, path)
    tenant = rules.tenant(subject)
    limits = {resource.value: getattr(tenant.limits, resource.value) for resource in Resource}
    facts: dict[str, object] = {
        "subject": subject.spoken() if subject.node else ",".join((subject.name, *subject.groups)),
        "action": action,
        "allowed": decision.allowed,
        "rule": decision.rule,
        "tenant": tenant.key,
    }
    if settings.json:
        output.print_json({**facts, "limits": limits})
    else:
        output.print_facts({**facts, "allowed": "yes" if decision.allowed else "no", "limits": _told(limits)})
    if not decision.allowed:
        raise click.exceptions.Exit(_DENIED)


def _traits(settings: Settings, name: str) -> Traits:
    region = settings.at_owner(lambda node: node.region(name))
    return Traits(region.owner, region.device, region.labels)


def _decide(rules: Rules, subject: Subject, action: Action, traits: Traits, path: str) -> Decision:
    return rules.decide_file(subject, action, path) if path else rules.decide(subject, action, traits)


def _told(limits: dict[str, int | None]) -> dict[str, str]:
    """Return the limits that there are, for people."""
    sizes = {resource.value for resource in _SIZES}
    return {
        key: format_size(limit) if key in sizes else str(limit) for key, limit in limits.items() if limit is not None
    }
