"""peermemd: run until SIGTERM or SIGINT; SIGHUP has the policy file read again.

Exit codes: 0 stopped in order, 1 could not start, 2 wrong usage or configuration, 130 ended at once by a second signal.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import resource
import signal
import sys
from pathlib import Path

import structlog

from peermem import policy_file
from peermem.config import DEFAULT_PATH, Config, given_by_manager, load
from peermem.core.version import VERSION
from peermem.strict_toml import ConfigError
from peermem.supervisor import Supervisor
from peermem.telemetry import logs

log = structlog.get_logger(__name__)


def main(arguments: list[str] | None = None) -> int:
    """Run the daemon; return its exit code."""
    # in a container this is the first process, for which the kernel drops a signal that has no handler
    signal.signal(signal.SIGTERM, _ended_early)
    parser = argparse.ArgumentParser(prog="peermemd", description="Serve this node's device memory to the cluster.")
    parser.add_argument("--config", type=Path, help=f"TOML file (default: {DEFAULT_PATH}, if it is there)")
    parser.add_argument("--check", action="store_true", help="check the configuration and exit")
    parser.add_argument("--version", action="version", version=f"peermemd {VERSION}")
    options = parser.parse_args(arguments)
    try:
        config = load(options.config)
        if config.policy.file:
            policy_file.read(Path(config.policy.file))
    except ConfigError as error:
        print(error, file=sys.stderr)  # noqa: T201  # before logs are set up, for whoever started it
        return 2
    if options.check:
        return 0
    logs.set_up(config.log.level, config.log.format, sys.stderr)
    _raise_file_limit()
    try:
        return asyncio.run(run(config))
    except ConfigError as error:  # the policy file has changed since it was read above
        log.error("start_failed", cause=str(error))
        return 2


async def run(config: Config) -> int:
    """Run one daemon until a signal; a second signal ends the process at once."""
    # gRPC's core would write lines of its own form, one for each handshake of a stranger that fails; what concerns us
    # it raises. It reads this when it is imported, so that it is set before.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # noqa: TID251 - set here, not read
    from peermem.app import App

    app = App(config, Supervisor(given_by_manager()))
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _signalled, stop)
    loop.add_signal_handler(signal.SIGHUP, app.reload)
    try:
        await app.start()
    except OSError as error:
        log.error("start_failed", cause=str(error))
        return 1
    gc.collect()
    gc.freeze()  # what was made up to here stays: looking through it again and again would stall the loop
    await stop.wait()
    await app.stop()
    return 0


def _ended_early(*_: object) -> None:
    """End before the loop runs, while there is nothing to close yet."""
    os._exit(0)


def _signalled(stop: asyncio.Event) -> None:
    if stop.is_set():
        log.warning("ended_at_once")
        os._exit(130)
    stop.set()


def _raise_file_limit() -> None:
    """Each region needs a file descriptor: take all that the system allows."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


if __name__ == "__main__":
    sys.exit(main())
