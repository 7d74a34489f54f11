"""How property tests draw their examples: the same ones each time."""

import os

from hypothesis import HealthCheck, Phase, settings

EXAMPLES = settings(
    max_examples=50,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    # Not to find the simplest example that fails, where it is enough that one does (mutants.py).
    phases=[Phase.generate] if "WITHOUT_SHRINKING" in os.environ else [Phase.generate, Phase.shrink],
)
