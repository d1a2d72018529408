"""The processes of a job meet before JAX begins.

JAX's client waits without a word and, where one process does not come, or two have one index, ends the others
by an abort that no Python sees. Here every process tells process 0 who it is, at the address where JAX begins
afterwards; process 0 answers when all are there, or tells all of them who is missing or has come twice.
"""

from __future__ import annotations

import contextlib
import errno
import json
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from maxllm.errors import RunFailed, UserError, listed
from maxllm.parallel.discovery import COORDINATOR, COUNT, INDEX, Place

LINE_BYTES = 4096
"""The longest line that is read of another process."""

INTRODUCTION_SECONDS = 5.0
"""So long process 0 waits for a line of whoever connects, which may be a stranger."""

RETRY_SECONDS = 0.5
REPORT_SECONDS = 30.0
"""Who waits says for whom as often."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Guest:
    """A process that has come to process 0."""

    host: str
    connection: socket.socket

    def is_there(self) -> bool:
        """Whether the process still holds its end of the connection."""
        self.connection.setblocking(False)
        try:
            return self.connection.recv(1, socket.MSG_PEEK) != b""
        except BlockingIOError:
            return True
        except OSError:
            return False

    def tell(self, answer: dict[str, Any]) -> None:
        """Sends a line; one that is gone hears nothing."""
        with contextlib.suppress(OSError):
            self.connection.setblocking(True)
            self.connection.settimeout(INTRODUCTION_SECONDS)
            self.connection.sendall(line_of(answer))


@dataclass(frozen=True)
class Meeting:
    """All processes have come, and are still connected."""

    hosts: int
    """On how many hosts they are, by the hosts' names."""
    guests: dict[int, Guest]
    """In process 0: each of the others. In another: process 0."""

    def close(self) -> None:
        """Ends the connections, which nobody needs for what follows."""
        for guest in self.guests.values():
            guest.connection.close()


def meet(place: Place, seconds: float, say: Say) -> Meeting:
    """Waits until all processes of a job, of which there are several, have come.

    Args:
      place: this process's.
      seconds: how long the others are waited for.
      say: takes sentences on who is missing.

    Raises:
      UserError: the port is taken, two have one index, or they do not agree on how many they are.
      RunFailed: not all came.
    """
    return receive(place, seconds, say) if place.index == 0 else visit(place, seconds, say)


# --- process 0 ---------------------------------------------------------------------------------------------


def receive(place: Place, seconds: float, say: Say) -> Meeting:
    """Process 0 waits for the others, and tells each what came of it."""
    guests: dict[int, Guest] = {}
    deadline = time.monotonic() + seconds
    try:
        with listening(place) as server:
            gather(place, server, guests, deadline, say)
        missing = absent(place, guests)
        if missing:
            here = [
                f"0 ({socket.gethostname()})",
                *(f"{index} ({guests[index].host})" for index in sorted(guests)),
            ]
            raise RunFailed(
                f"{len(missing)} of {place.processes} processes did not come to {place.coordinator} within "
                f"{seconds:g} s (launch.rendezvous_seconds): {listed(map(str, missing))}; here are "
                f"{listed(here)}"
            )
    except (RunFailed, UserError) as error:
        for guest in guests.values():
            guest.tell({"error": str(error), "usage": isinstance(error, UserError)})
            guest.connection.close()
        raise
    hosts = len({socket.gethostname(), *(guest.host for guest in guests.values())})
    for guest in guests.values():
        guest.tell({"hosts": hosts, "host": socket.gethostname()})
    return Meeting(hosts, guests)


def listening(place: Place) -> socket.socket:
    """A socket on the coordinator's port of this host, whichever of its addresses the others use.

    Raises:
      UserError: the port is taken.
    """
    port = int(place.coordinator.rpartition(":")[2])
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        return socket.create_server(("", port), family=family, backlog=1024, dualstack_ipv6=dual)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        raise UserError(
            f"port {port} of {COORDINATOR}={place.coordinator} is taken on this host: another job has it, or "
            f"another process has {INDEX}=0"
        ) from None


def gather(place: Place, server: socket.socket, guests: dict[int, Guest], deadline: float, say: Say) -> None:
    """Adds whoever comes to the guests, until all are there or the time is over.

    Raises:
      UserError: two have one index, or another number of processes.
    """
    report = time.monotonic() + REPORT_SECONDS
    while (now := time.monotonic()) < deadline:
        if now >= report:
            report = now + REPORT_SECONDS
            say(f"waiting for {listed(map(str, absent(place, guests)))} of {place.processes} processes")
        server.settimeout(max(0.01, min(deadline, report) - now))
        with contextlib.suppress(TimeoutError):
            connection, _ = server.accept()
            welcome(place, connection, guests)
        if len(guests) == place.processes - 1 and not absent(place, guests):
            return


def welcome(place: Place, connection: socket.socket, guests: dict[int, Guest]) -> None:
    """Takes one who has connected among the guests; strangers are sent away.

    Raises:
      UserError: see `gather`.
    """
    connection.settimeout(INTRODUCTION_SECONDS)
    said = line_from(connection)
    index, processes, host = (said.get(key) for key in ("index", "processes", "host"))
    if not isinstance(index, int) or not isinstance(processes, int) or not isinstance(host, str):
        connection.close()
        return
    guest = Guest(host[:255], connection)
    former = guests.get(index)
    if processes != place.processes or not 0 < index < place.processes:
        error = UserError(
            f"process {index} on {guest.host} says that there are {processes} processes, process 0 on "
            f"{socket.gethostname()} {place.processes}: {COUNT} must be the same in all of them"
        )
    elif former is not None and former.is_there():
        error = UserError(
            f"two processes have {INDEX}={index}, on {former.host} and {guest.host}: it must differ in each"
        )
    else:
        if former is not None:
            former.connection.close()
        guests[index] = guest
        return
    guest.tell({"error": str(error), "usage": True})
    connection.close()
    raise error


def absent(place: Place, guests: dict[int, Guest]) -> list[int]:
    """Indexes of those who have not come, or have gone again; the latter are no guests any more."""
    for index in [index for index, guest in guests.items() if not guest.is_there()]:
        guests.pop(index).connection.close()
    return [index for index in range(1, place.processes) if index not in guests]


# --- the others --------------------------------------------------------------------------------------------


def visit(place: Place, seconds: float, say: Say) -> Meeting:
    """Comes to process 0, again if it is gone, and waits for its answer."""
    deadline = time.monotonic() + seconds
    report = time.monotonic() + REPORT_SECONDS
    why = "it has not answered"
    while (left := deadline - time.monotonic()) > 0:
        try:
            answer, connection = answer_of(place, left)
        except OSError as error:
            why = error.strerror or str(error)
            answer, connection = {}, None
        hosts, host = answer.get("hosts"), answer.get("host")
        if connection is not None and isinstance(hosts, int) and isinstance(host, str):
            return Meeting(hosts, {0: Guest(host[:255], connection)})
        if connection is not None:
            connection.close()
        if isinstance(answer.get("error"), str):
            raise UserError(answer["error"]) if answer.get("usage") else RunFailed(answer["error"])
        if time.monotonic() >= report:
            report = time.monotonic() + REPORT_SECONDS
            say(f"process {place.index} waits for process 0 at {place.coordinator}: {why}")
        time.sleep(min(RETRY_SECONDS, max(0.0, deadline - time.monotonic())))
    raise RunFailed(
        f"process {place.index} of {place.processes} on {socket.gethostname()} did not meet process 0 at "
        f"{place.coordinator} within {seconds:g} s (launch.rendezvous_seconds): {why}"
    )


def answer_of(place: Place, seconds: float) -> tuple[dict[str, Any], socket.socket]:
    """What process 0 answers, and the connection; {} where it, or whoever listens there, goes without a word.

    Raises:
      OSError: nobody listens, or the time is over.
    """
    host, _, port = place.coordinator.rpartition(":")
    address = host.strip("[]"), int(port)
    connection = socket.create_connection(address, timeout=min(seconds, INTRODUCTION_SECONDS))
    try:
        own = {"index": place.index, "processes": place.processes, "host": socket.gethostname()}
        connection.sendall(line_of(own))
        connection.settimeout(seconds)
        return line_from(connection), connection
    except OSError:
        connection.close()
        raise


# --- lines -------------------------------------------------------------------------------------------------


def line_of(message: dict[str, Any]) -> bytes:
    """A message as it travels."""
    return json.dumps(message).encode() + b"\n"


def line_from(connection: socket.socket) -> dict[str, Any]:
    """The message in the line that comes; {} where none comes, or it is none of ours."""
    received = b""
    try:
        while not received.endswith(b"\n") and len(received) < LINE_BYTES:
            part = connection.recv(1)  # no more than this line: others may follow
            if not part:
                return {}
            received += part
        message = json.loads(received)
    except (OSError, ValueError):
        return {}
    return message if isinstance(message, dict) else {}
