"""The environment of commands that tests start."""

import os

SIMULATED = "--xla_force_host_platform_device_count"
EFFORT = "--xla_backend_optimization_level="

ONE_DEVICE = dict(os.environ) | {
    "XLA_FLAGS": " ".join(
        EFFORT + "1" if flag.startswith(EFFORT) else flag
        for flag in os.environ.get("XLA_FLAGS", "").split()
        if not flag.startswith(SIMULATED)
    )
}
"""As a user's, with one device. Here the compiler makes some effort, where conftest.py asks for none: these
commands compute longer than they compile (the fast road: 93 s instead of 145)."""
