"""How soon Ray takes a node for dead that does not answer: two profiles of its health checks.

What is gained by noticing a death early is lost when a node that was only out of reach is taken for dead: its
attempt ends, although it would have gone on. ``docs/operations.md`` has what was measured of both.
"""

import os
from collections.abc import Mapping

from ..errors import PreflightFailed, Problem, shown

ENVIRONMENT = "ORCHESTRATE_DETECTION"
"""Names the profile for the clusters that we start."""

DEFAULT = "fast"

PROFILES: Mapping[str, Mapping[str, int]] = {
    "fast": {
        "health_check_initial_delay_ms": 1000,
        "health_check_period_ms": 1000,
        "health_check_timeout_ms": 2000,
        "health_check_failure_threshold": 3,
    },
    # Ray's own, spelled out: another version may have others.
    "patient": {
        "health_check_initial_delay_ms": 5000,
        "health_check_period_ms": 3000,
        "health_check_timeout_ms": 10000,
        "health_check_failure_threshold": 5,
    },
}


def system_config(environment: Mapping[str, str] = os.environ) -> dict[str, int]:
    """Return what a head is told when we start it from Python.

    Raises:
        PreflightFailed: There is no profile of the name that the environment gives.
    """
    name = environment.get(ENVIRONMENT) or DEFAULT
    if name not in PROFILES:
        message = f"{ENVIRONMENT} is {shown(name)}, which is no profile of health checks"
        raise PreflightFailed([Problem("E2610", message, hint=f"one of {', '.join(PROFILES)}")])
    return dict(PROFILES[name])


def as_environment(profile: str) -> dict[str, str]:
    """Return the variables by which ``ray start --head`` is told the same."""
    return {f"RAY_{name}": str(value) for name, value in PROFILES[profile].items()}
