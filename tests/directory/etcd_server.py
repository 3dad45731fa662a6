"""Tests need etcd, and have some patience with it."""

from __future__ import annotations

import shutil

import pytest
from bench.etcd import EtcdServer as EtcdServer
from bench.etcd import etcd_members as etcd_members
from bench.etcd import etcd_server as etcd_server

PATIENCE = 20.0
"""Seconds for anything that etcd or a directory does."""
needs_etcd = pytest.mark.skipif(shutil.which("etcd") is None, reason="etcd is missing: install Debian's etcd-server")
