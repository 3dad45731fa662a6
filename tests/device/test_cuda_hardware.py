"""CUDA devices on a real GPU, where there is one."""

from __future__ import annotations

import ctypes.util
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.device.on_gpu import GPUS


def test_a_real_gpu_passes_the_conformance_suite() -> None:
    if not GPUS or ctypes.util.find_library("cuda") is None:
        pytest.skip("there is no GPU of NVIDIA's with its driver here")
    if find_spec("cuda") is None:
        pytest.skip("the package cuda-bindings (peermem[cuda]) is not installed")
    suite = Path(__file__).with_name("on_gpu.py")
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", str(suite)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
