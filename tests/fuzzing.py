"""What the fuzzed parsers share: how much is tried, and how often each was.

Rules of this file:

* FUZZ_EXAMPLES in the environment is how many examples each test tries, instead of its own few. FUZZ_REPORT is a file
  to which the counts are written at the end, as JSON.
* What fails is told as it was found: a call without an answer takes its whole patience, too long to find a smaller one.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

from hypothesis import HealthCheck, Phase, settings

_tried: Counter[str] = Counter()


def fuzz(examples: int) -> settings:
    """Return the settings of a fuzzed test that tries so many examples unless more are asked for."""
    return settings(
        max_examples=int(os.environ.get("FUZZ_EXAMPLES", examples)),
        deadline=None,
        phases=(Phase.explicit, Phase.reuse, Phase.generate),
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )


def tried(parser: str) -> None:
    """A parser was given an input that is, or may be, malformed."""
    _tried[parser] += 1


def report() -> None:
    """Write the counts, where that is asked for."""
    path = os.environ.get("FUZZ_REPORT")
    if path:
        Path(path).write_text(json.dumps({"inputs": dict(sorted(_tried.items()))}, indent=1) + "\n")
