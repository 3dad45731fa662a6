"""Publishes this node's devices in Kubernetes, as a ResourceSlice (dynamic resource allocation, resource.k8s.io/v1).

Rules of this file:

* The slice is compared with what the API server has, and written only where it differs: a daemon that starts anew or
  whose slice was changed puts it right. The API server adds to what it is sent (when a taint was set) and takes
  away what it has switched off, so that what it made of a spec is no difference.
* Trouble with the API server is told once, until it is over, and harms nothing else.
* The slice goes when the daemon stops in order, and with the node.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import msgspec
import structlog

from peermem.api.api_server import ApiCallError, ApiClient
from peermem.core.resource_slice import slice_name, slice_object

log = structlog.get_logger(__name__)

_SLICES = "/apis/resource.k8s.io/v1/resourceslices"
_EVERY = 30.0


class _Metadata(msgspec.Struct):
    uid: str = ""
    resourceVersion: str = ""


class _Known(msgspec.Struct):
    """What is looked at in an object of the API server's."""

    metadata: _Metadata
    spec: dict[str, Any] = {}


class SlicePublisher:
    """Keeps the slice of one node up to date."""

    def __init__(
        self, client: ApiClient, node: str, spec: Callable[[], Awaitable[dict[str, Any]]], every: float = _EVERY
    ) -> None:
        """`node` is Kubernetes' name of this node; `spec` returns what the slice should say, every so many seconds."""
        self._client = client
        self._node = node
        self._place = f"{_SLICES}/{slice_name(node)}"
        self._spec = spec
        self._every = every
        self._trouble = ""
        self._written: tuple[dict[str, Any], dict[str, Any]] = {}, {}
        """What was sent last, without the pool's generation, and what the API server made of it."""

    async def tend(self) -> None:
        """Publish what is there, for as long as the daemon runs."""
        while True:
            try:
                await self.publish()
                self._trouble = ""
            except ApiCallError as error:
                if str(error) != self._trouble:
                    self._trouble = str(error)
                    log.warning("devices_not_published", node=self._node, server=self._client.url, cause=str(error))
            except Exception:
                log.exception("resource_slice_defect")
            await asyncio.sleep(self._every)

    async def publish(self) -> None:
        """Make the slice say what is there now. Raises ApiCallError."""
        spec = await self._spec()
        known = await self._get(self._place)
        if known is None:
            self._written = (
                spec,
                await self._write("POST", _SLICES, slice_object(self._node, await self._uid(), spec, 1)),
            )
            return
        generation = int(known.spec.get("pool", {}).get("generation", 0))
        wanted = slice_object(self._node, await self._uid(), spec, generation, known.metadata.resourceVersion)
        if wanted["spec"] != known.spec and self._written != (spec, known.spec):
            wanted["spec"]["pool"]["generation"] = generation + 1
            self._written = spec, await self._write("PUT", self._place, wanted)

    async def withdraw(self) -> None:
        """Take the slice away, if the API server answers."""
        with suppress(ApiCallError):
            await self._client.call("DELETE", self._place)

    async def _uid(self) -> str:
        node = await self._get(f"/api/v1/nodes/{self._node}")
        if node is None:
            raise ApiCallError(f"it knows no node {self._node}: set kubernetes.publish_as to this node's name there")
        return node.metadata.uid

    async def _get(self, path: str) -> _Known | None:
        status, body = await self._client.call("GET", path)
        if status == 404:
            return None
        if status != 200:
            raise ApiCallError(_refused("GET", path, status))
        return _read("GET", path, body)

    async def _write(self, method: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Write the slice; return the spec that the API server has made of it."""
        status, answer = await self._client.call(method, path, body)
        if status not in (200, 201):
            raise ApiCallError(_refused(method, path, status))
        log.info("devices_published", node=self._node, devices=len(body["spec"]["devices"]))
        return _read(method, path, answer).spec


def _read(method: str, path: str, body: bytes) -> _Known:
    try:
        return msgspec.json.decode(body, type=_Known)
    except msgspec.MsgspecError:
        raise ApiCallError(f"its answer to {method} {path} makes no sense") from None


def _refused(method: str, path: str, status: int) -> str:
    hint = "; the daemon's ClusterRole has to allow it" if status == 403 else ""
    return f"it answered {status} to {method} {path}{hint}"
