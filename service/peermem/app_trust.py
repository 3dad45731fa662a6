"""Whom a daemon believes, as its configuration asks for it: the part of the composition root that is about trust."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from contextlib import AsyncExitStack
from pathlib import Path

import structlog

from peermem.api.api_server import ApiClient, ApiServer
from peermem.api.identity import Trust
from peermem.api.kubernetes import TokenReviewer
from peermem.config import Config, Kubernetes, Tls
from peermem.core.spiffe import Denied, NodePattern
from peermem.credentials.base import Credentials, Source
from peermem.credentials.denied import follow_denied, read_denied
from peermem.credentials.files import CredentialFiles
from peermem.credentials.trial import BadPair
from peermem.credentials.workload_api import WorkloadApi
from peermem.telemetry.certificates import Whose

log = structlog.get_logger(__name__)

Spawn = Callable[[Coroutine[None, None, None]], None]


async def open_trust(config: Config, stack: AsyncExitStack, spawn: Spawn) -> Trust:
    """Return what callers may show; `spawn` runs what renews it, and `stack` ends it. Raises OSError where it can't be
    had."""
    _warn(config)
    review = None
    if config.kubernetes.api_server:
        reviewer = _reviewer(config.kubernetes, config.kubernetes.api_server)
        stack.push_async_callback(reviewer.close)
        review = reviewer.review
    return Trust(await _credentials(config, stack, spawn), review, config.tls.anonymous)


async def _credentials(config: Config, stack: AsyncExitStack, spawn: Spawn) -> Credentials | None:
    tls = config.tls
    if not tls.on or not tls.nodes:
        return None
    pattern, denied = NodePattern(tls.nodes), Path(tls.denied) if tls.denied else None
    source = _source(tls, pattern.spiffe_id(config.node))
    stack.callback(source.close)
    try:
        pair = await source.first()
        credentials = Credentials(config.node, pattern, pair, read_denied(denied) if denied else Denied())
    except (BadPair, OSError) as error:
        raise OSError(f"[tls] can't be put in force: {error}. Renew what it names, or correct it.") from None
    log.info("tls", spiffe_id=credentials.now.shown.spiffe_id, until=credentials.now.shown.not_after)
    spawn(source.follow(credentials))
    if denied is not None:
        spawn(follow_denied(denied, credentials))
    return credentials


def ends(credentials: Credentials) -> Mapping[Whose, float]:
    """Return when certificates end, in seconds since 1970."""
    own, authorities = credentials.ends()
    return {Whose.NODE: own, **({Whose.AUTHORITY: authorities} if authorities is not None else {})}


def _source(tls: Tls, spiffe_id: str) -> Source:
    if tls.workload_api:
        return WorkloadApi(tls.workload_api, spiffe_id)
    certificate, key, ca = (Path(file or "") for file in (tls.certificate, tls.key, tls.ca))
    return CredentialFiles(certificate, key, ca)


def _reviewer(config: Kubernetes, url: str) -> TokenReviewer:
    client = ApiClient(ApiServer(url, Path(config.ca), Path(config.token)))
    return TokenReviewer(client, config.audience, config.this_node_only)


def _warn(config: Config) -> None:
    """Say at each start, at a level that no configuration of logs leaves out, that strangers are let in."""
    if config.insecure_network:
        log.error(
            "insecure_network",
            warning="NO AUTHENTICATION: whoever reaches these ports can act as any client of any other node. "
            "Set [tls] and remove insecure_network.",
            grpc=config.grpc.address,
            tcp=config.tcp.address,
        )
