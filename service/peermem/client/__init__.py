"""What a job imports: `peermem.connect()` and `peermem.aio.connect()`; pure parts, and two thin shells over gRPC.

Rules of this package:

* It imports gRPC, protobuf, `peermem.v1` and `peermem.core`, and nothing that belongs to the daemon.
* What needs no I/O is written once: facts, requests, segments, errors, targets, pipeline, leases.
* `sync` and `aio` hold the same names; each keeps one channel, at most one pipeline and one renewal loop.
* Only `peermem.errors` leave it.
"""
