"""Policies for tests, as an operator writes them."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from peermem import policy_file
from peermem.broker.guard import Guard
from peermem.core.policy import Rules
from peermem.telemetry.audit import Audit
from peermem.telemetry.metrics import Metrics


def policy(text: str) -> Rules:
    """Return what a policy file with this text means."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "policy.toml"
        file.write_text(text)
        return policy_file.read(file)


def guard(node: str, rules: Rules, metrics: Metrics) -> Guard:
    """Return what decides by rules."""
    return Guard(node, rules, Audit("denied"), metrics.policy)


def rule(name: str, subjects: str, rights: str, more: str = "") -> str:
    """Return a rule; subjects and rights have spaces between them."""
    return f'[[rule]]\nname = "{name}"\nsubjects = {subjects.split()}\nrights = {rights.split()}\n{more}\n'


def tenant(name: str, subjects: str, more: str) -> str:
    """Return a tenant."""
    return f'[[tenant]]\nname = "{name}"\nsubjects = {subjects.split()}\n{more}\n'
