"""The command line: one verb per job. Parses, then does it; nothing heavy is imported before that.

Exit codes: 0 done; 1 the run failed; 2 bad input, one sentence on stderr; 3 a plan does not fit its machine;
75 interrupted: the same command continues.
"""

from __future__ import annotations

import argparse
import errno
import io
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from maxllm.errors import DoesNotFit, Interrupted, RunFailed, UserError, leave
from maxllm.options import RECIPE_VERBS, parse
from maxllm.parallel.compiler import without_tpu
from maxllm.parallel.hugepages import restart_with_huge_pages
from maxllm.phases import PHASES, Phase
from maxllm.storage import refusal
from maxllm.verbs import VERBS

CONTINUES = {"quickstart", "export", "convert", *RECIPE_VERBS}
"""Verbs that go on where they were interrupted, as does `generate --prompts`: launchers retry code 75."""


def entry() -> NoReturn:
    """The `maxllm` command. Outside a training loop, which has its own handlers, a signal ends it at once."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    options = parse(None)
    if options.verb in {"quickstart", *RECIPE_VERBS}:
        restart_with_huge_pages()
    if options.verb in CONTINUES or (options.verb == "generate" and options.prompts):
        code, sentence = 75, "interrupted; the same command continues from what was saved"
    else:
        code, sentence = 130, "interrupted"
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, lambda *_: leave(code, sentence))
    done = run(options)
    if done in (1, 2) or PHASES.phase is Phase.BEREAVED:
        # Reads and writes under way in libraries' threads would print tracebacks while Python shuts down, and
        # JAX would wait for a process that is gone.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(done)
    sys.exit(done)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the words of a command and runs its verb; returns the exit code."""
    return run(parse(arguments))


def run(options: argparse.Namespace) -> int:
    """Runs one verb; returns the exit code."""
    quiet_libraries()
    try:
        VERBS[options.verb](options)
    except UserError as error:
        return fail(options, error, 2)
    except RunFailed as error:
        return fail(options, error, 1)
    except DoesNotFit as error:
        return fail(options, error, 3)
    except Interrupted as error:
        return fail(options, error, 75)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        sentence = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        failure = UserError(refusal(error) or sentence)
        failure.__cause__ = error
        return fail(options, failure, 1 if is_full(error) else 2)
    except Exception as error:
        if (reason := refusal(error)) is None:
            raise
        failure = UserError(reason)
        failure.__cause__ = error
        return fail(options, failure, 2)
    return 0


def is_full(error: OSError) -> bool:
    """Whether the disk is full: the same command may work once there is room."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def fail(options: argparse.Namespace, error: Exception, code: int) -> int:
    """One sentence on stderr; with --debug, where it came from too."""
    if options.debug:
        import traceback

        traceback.print_exception(error)
    print(f"maxllm: {error}", file=sys.stderr)
    return code


def quiet_libraries() -> None:
    """Libraries' start-up notes are not ours to print; their warnings and errors still are."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    without_tpu()
    sys.unraisablehook = without_late_reads


def without_late_reads(event: Any) -> None:
    """When one read of a checkpoint fails, TensorStore says of all others that their event loop is closed."""
    if str(event.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(event)


if __name__ == "__main__":
    entry()
