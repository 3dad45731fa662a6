"""The faults that `peermem.connect` and what it returns can raise: one class per reason."""

from peermem.core.errors import *  # noqa: F403 - all of them, by design
