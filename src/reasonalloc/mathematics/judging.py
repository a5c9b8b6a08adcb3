"""``judge`` in a process of its own, which is ended when an answer takes too long. Any thread may ask."""

from __future__ import annotations

import atexit
import faulthandler
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import warnings
from contextlib import suppress
from typing import Any

from reasonalloc.mathematics.comparing import judge

LIMIT = 10.0  # seconds for an answer
_MEMORY = 4 << 30  # bytes of addresses that the process may use
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.stdin.readline()); "
    "from reasonalloc.mathematics.judging import serve; serve()"
)


class Judge:
    """A process that judges one answer at a time; started when first asked, and again after it was ended.

    It needs nothing of the caller's main module, and ends with the process that started it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, reference: str, text: str, limit: float = LIMIT) -> dict[str, Any] | None:
        """What ``judge`` says; None where that takes longer than the limit in seconds, or more memory than there is.

        Raises:
            RuntimeError: the process cannot be started.
        """
        with self._lock:
            if self._process is not None and self._process.poll() is not None:
                self._end()  # killed from outside since the last answer
            process = self._process or self._start()
            try:
                line = _exchange(process, [reference, text, limit])
            except BaseException:  # an interrupt, say: what it answers later would be taken for the next answer
                self._end()
                raise
            if not line.endswith(b"\n"):
                self._end()
                return None
        found: dict[str, Any] = json.loads(line)
        return found

    def close(self) -> None:
        """End the process, if there is one."""
        with self._lock:
            self._end()

    def forget(self) -> None:
        """In a forked child: the process is the parent's."""
        process, self._process, self._lock = self._process, None, threading.Lock()
        if process is not None:
            process.returncode = 0  # not ours to wait for
            _close_pipes(process)

    def _start(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", _START],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,  # a forked child must have nothing of ours to flush
        )
        self._process = process
        try:
            ready = _exchange(process, [str(path) for path in sys.path])
        except BaseException:
            self._end()
            raise
        if not ready:
            self._end()
            raise RuntimeError("the process that grades mathematics did not start; see above for why")
        return process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            _close_pipes(process)
            process.wait()


def _exchange(process: subprocess.Popen[bytes], message: Any) -> bytes:
    """A line for a line; an empty one where the process has ended."""
    assert process.stdin is not None
    assert process.stdout is not None
    left = json.dumps(message).encode() + b"\n"
    with suppress(BrokenPipeError):
        while left:
            left = left[process.stdin.write(left) :]
    return process.stdout.readline()


def _close_pipes(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


def serve() -> None:
    """The process: references and texts on its input, verdicts on its output, until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the caller decides
    output, sys.stdout = sys.stdout, sys.stderr  # what a library prints is no verdict
    logging.disable()
    warnings.simplefilter("ignore")
    with suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    judge("1", "\\boxed{1}")  # loads all that it needs
    with open(os.devnull, "w") as nowhere:
        print("{}", file=output, flush=True)
        for line in sys.stdin:
            reference, text, limit = json.loads(line)
            faulthandler.dump_traceback_later(limit, exit=True, file=nowhere)  # ends also what holds the interpreter
            try:
                verdict = judge(reference, text)
            except MemoryError:
                break
            except Exception as error:  # one answer must not end a report on thousands
                fault = f"the answer was not judged: {type(error).__name__}: {error}"
                verdict = {"extracted": None, "score": 0.0, "fault": fault}
            faulthandler.cancel_dump_traceback_later()
            print(json.dumps(verdict), file=output, flush=True)


JUDGE = Judge()
atexit.register(JUDGE.close)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=JUDGE.forget)
