"""Student's t intervals: how far a mean over a few runs may be off."""

import math
import statistics
from collections.abc import Sequence


def student_t_within(theta: float, degrees: int) -> float:
    """P(|T| <= sqrt(degrees) tan(theta)) for Student's t with a whole number of degrees of freedom.

    The finite series of Abramowitz and Stegun, 26.7.3 and 26.7.4.
    """
    odd, cosine = degrees % 2, math.cos(theta)
    term = math.sin(theta) * (cosine if odd else 1.0)
    total = 0.0
    for factor in range(1 + odd, degrees, 2):
        total += term
        term *= cosine**2 * factor / (factor + 1)
    return 2 / math.pi * (theta + total) if odd else total


def student_t_quantile(confidence: float, degrees: int) -> float:
    """The t with P(|T| <= t) = `confidence`, in (0, 1), by bisection; 4.303 for 0.95 and 2 degrees."""
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if student_t_within(middle, degrees) < confidence else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def mean_interval(values: Sequence[float], confidence: float) -> tuple[float, float]:
    """The t interval around the mean of two or more independent values."""
    error = statistics.stdev(values) / math.sqrt(len(values))
    reach = student_t_quantile(confidence, len(values) - 1) * error
    mean = statistics.fmean(values)
    return mean - reach, mean + reach
