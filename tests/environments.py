"""The environment of commands that tests start."""

import os

SIMULATED = "--xla_force_host_platform_device_count"

ONE_DEVICE = dict(os.environ) | {
    "XLA_FLAGS": " ".join(f for f in os.environ.get("XLA_FLAGS", "").split() if not f.startswith(SIMULATED))
}
"""As a user's, with one device; the compiler makes as little effort as in conftest.py."""
