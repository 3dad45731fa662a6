"""The command preflight: what works on a node, and what does not, why and what to do.

Rules of this file:

* A table holds what was found; sentences stand below it, each once, with what they are about.
* A path that does not work is no failure where another one does for the same device and NIC.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import click

import peermem
from peermem.cli import output, parsing
from peermem.cli.options import pass_settings
from peermem.cli.settings import Settings
from peermem.core.units import format_duration


@click.command()
@click.option(
    "--device",
    "devices",
    multiple=True,
    metavar="NAME",
    shell_complete=parsing.complete_devices,
    help="Try this device only; may be repeated.",
)
@pass_settings
def preflight(settings: Settings, devices: tuple[str, ...]) -> None:
    """Prove what works on the node, by moving bytes between each device and each NIC.

    The exit code is 0 when all works, each device with each NIC by some path; 1 when something does not.
    """
    verdicts: list[peermem.Verdict] = []
    with output.Steps("preflight", settings.json) as steps:
        for verdict in settings.node.preflight(*devices):
            verdicts.append(verdict)
            steps.show(verdict.done, verdict.total, _subject(verdict))
    if settings.json:
        output.print_json({"verdicts": [_facts(verdict) for verdict in verdicts]})
    else:
        _print(verdicts)
    if _failed(verdicts):
        raise click.exceptions.Exit(1)


def _failed(verdicts: Sequence[peermem.Verdict]) -> list[peermem.Verdict]:
    """Return the verdicts on what does not work in any way."""
    reached = {(verdict.device, verdict.nic) for verdict in verdicts if verdict.device and verdict.works}
    return [verdict for verdict in verdicts if not verdict.works and (verdict.device, verdict.nic) not in reached]


def _facts(verdict: peermem.Verdict) -> dict[str, object]:
    facts: dict[str, object] = output.plain(verdict)
    return {key: value for key, value in facts.items() if key not in ("done", "total")}


def _print(verdicts: Sequence[peermem.Verdict]) -> None:
    checks = [(verdict.check, _word(verdict), verdict.detail) for verdict in verdicts if verdict.check]
    tried = [_row(verdict) for verdict in verdicts if verdict.device]
    alone = [verdict for verdict in verdicts if verdict.nic and not verdict.device]
    nics = [(verdict.nic, _word(verdict), verdict.detail) for verdict in alone]
    output.print_table(("NODE", "VERDICT", "FOUND"), checks)
    if nics:
        click.echo()
        output.print_table(("NIC", "VERDICT", "FOUND"), nics)
    if tried:
        click.echo()
        output.print_table(("DEVICE", "NIC", "PATH", "VERDICT", "LATENCY", "WRITE", "READ", "FOUND"), tried)
    failed = _failed(verdicts)
    avoided = [verdict for verdict in verdicts if not verdict.works and verdict not in failed]
    _print_sentences("FAILURES", _errors(failed))
    _print_sentences("NOT BY THIS PATH", _errors(avoided))
    _print_sentences("ADVICE", ((verdict.advice, verdict) for verdict in verdicts if verdict.advice))
    click.echo(f"\n{len(failed)} of {len(verdicts)} findings failed." if failed else "\nAll works.")


def _errors(verdicts: Iterable[peermem.Verdict]) -> Iterable[tuple[str, peermem.Verdict]]:
    return ((f"{verdict.error.message} ({verdict.error.reason})", verdict) for verdict in verdicts if verdict.error)


def _row(verdict: peermem.Verdict) -> tuple[object, ...]:
    return (
        verdict.device,
        verdict.nic,
        verdict.path,
        _word(verdict),
        None if verdict.latency is None else format_duration(verdict.latency),
        output.rate(verdict.write_bandwidth),
        output.rate(verdict.read_bandwidth),
        verdict.detail,
    )


def _print_sentences(heading: str, said: Iterable[tuple[str, peermem.Verdict]]) -> None:
    """Print each sentence once, under all that it was said of."""
    subjects: dict[str, list[str]] = {}
    for sentence, verdict in said:
        subjects.setdefault(sentence, []).append(_subject(verdict))
    if subjects:
        click.echo(f"\n{heading}")
    for sentence, names in subjects.items():
        click.echo(f"{', '.join(names)}:")
        output.print_sentence(sentence)


def _subject(verdict: peermem.Verdict) -> str:
    if verdict.device:
        return f"{verdict.device} with {verdict.nic}" + (f" by {verdict.path.value}" if verdict.path else "")
    return verdict.check or verdict.nic or ""


def _word(verdict: peermem.Verdict) -> str:
    return "works" if verdict.works else "fails"
