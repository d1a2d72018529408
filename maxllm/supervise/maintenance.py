"""Google tells its machines that they will be taken away: a run saves and ends before that.

    instance/preempted              TRUE, about 30 seconds before a spot machine is taken
    instance/maintenance-event      TERMINATE_ON_HOST_MAINTENANCE, a minute to an hour before
    instance/upcoming-maintenance   the window of maintenance, days before (of TPUs)

https://cloud.google.com/compute/docs/metadata/getting-live-migration-notice and
https://cloud.google.com/tpu/docs/view-maintenance-notifications. Elsewhere a SIGTERM says the same.
"""

from __future__ import annotations

import datetime
import json
import os
import time
from collections.abc import Callable

from maxllm.config.launch import LaunchConfig
from maxllm.parallel.cloud_tpu import METADATA, METADATA_HOST, metadata

LOOK_SECONDS = 5.0
"""As often the server is asked."""

PATIENCE_SECONDS = 1.0
"""So long it has to answer: a supervisor has other things to do."""

REST_SECONDS = 60.0
"""After no answer it is left alone for so long."""

BEFORE_SECONDS = 300.0
"""So long before a window of maintenance opens the run is asked to stop."""

Ask = Callable[[str], str | None]
"""What the machine says under a key; None where it says nothing."""


class Maintenance:
    """Looks now and then whether this machine is about to be taken away."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self._next = 0.0
        self._told: str | None = None

    def look(self, say: Callable[[str], None]) -> str | None:
        """Why the run must end now; None while it need not, which is most of the time without asking.

        Args:
          say: takes a sentence on maintenance that is still to come.
        """
        if time.monotonic() < self._next:
            return None
        self._next = time.monotonic() + LOOK_SECONDS
        try:
            if self._ask("preempted") == "TRUE":
                return "this machine is about to be preempted"
            if (self._ask("maintenance-event") or "").startswith("TERMINATE"):
                return "this machine is about to end for maintenance"
            window = window_of(self._ask("upcoming-maintenance?alt=json"))
        except OSError:
            self._next = time.monotonic() + REST_SECONDS
            return None
        if window is None:
            return None
        if (window - datetime.datetime.now(datetime.UTC)).total_seconds() < BEFORE_SECONDS:
            return f"maintenance of this machine begins at {window:%Y-%m-%d %H:%M} UTC"
        if self._told != (told := str(window)):
            self._told = told
            say(f"maintenance of this machine begins at {window:%Y-%m-%d %H:%M} UTC; the run saves before")
        return None


def window_of(answer: str | None) -> datetime.datetime | None:
    """When a window of maintenance opens; None where none is announced, or it cannot be read."""
    try:
        announced = json.loads(answer or "{}")
        return datetime.datetime.fromisoformat(announced["windowStartTime"]).astimezone(datetime.UTC)
    except (ValueError, KeyError, TypeError):
        return None


def maintenance_of(config: LaunchConfig, launcher: str | None) -> Maintenance | None:
    """What to look at on this machine; None where nobody is to be asked."""
    wanted = config.maintenance
    if wanted == "none" or (wanted == "auto" and (launcher != "Cloud TPU" or on_gke())):
        return None
    host = os.environ.get(METADATA, METADATA_HOST)
    return Maintenance(lambda key: metadata(host, key, PATIENCE_SECONDS))


def on_gke() -> bool:
    """Whether this is a pod, which Kubernetes tells by SIGTERM."""
    return "KUBERNETES_SERVICE_HOST" in os.environ
