"""The part of the composition root that makes the policy and its audit log."""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path

from peermem.broker.guard import Guard
from peermem.config import Config
from peermem.core.policy import OPEN, OWN
from peermem.policy_source import PolicySource
from peermem.telemetry.audit import Audit, AuditFile
from peermem.telemetry.policy import PolicyMetrics


def policy_source(config: Config, metrics: PolicyMetrics) -> PolicySource:
    """Return where the policy comes from. Raises ConfigError where its file is wrong."""
    return PolicySource(config.policy.file, OPEN if config.is_open_without_policy else OWN, metrics)


def open_guard(config: Config, source: PolicySource, metrics: PolicyMetrics, stack: AsyncExitStack) -> Guard:
    """Return what decides by the policy, with its audit log, which `stack` closes.

    Raises OSError where the log's file can't be written.
    """
    file = None
    if config.audit.file:
        file = AuditFile(Path(config.audit.file), metrics.not_audited)
        stack.callback(file.close)
    chosen = config.audit.decisions
    audit = Audit(("all" if config.policy.file else "denied") if chosen == "auto" else chosen, file)
    return Guard(config.node, source.rules, audit, metrics)
