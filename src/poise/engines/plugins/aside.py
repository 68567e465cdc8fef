"""A planner in a process of its own, so that no step of serving waits for it.

A thread hands a call over and waits for the answer; while it waits others run. The process starts with the first call,
and anew after it died; who asks may end it, and can see how many went without an answer. Python's own pools are of no
use here: they start from the engine's main module, or fork a process with a device, and engines' workers may not have
children by them.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

from poise.engines.plugins.child import ENVIRON, Answer
from poise.engines.plugins.policy import Asked
from poise.util.errors import CommunicationError, NoResultError


class _Child:
    """A process, how many before it went without an answer, and whether it has answered, or was ended.

    Who ends one need not wait until it is gone: from then on nobody asks it, and it counts as over. The system takes a
    moment for that, and whoever looks meanwhile would think that it runs.
    """

    def __init__(self, process: subprocess.Popen[bytes], before: int) -> None:
        self.process, self.before, self.answered = process, before, False
        self._ended = False

    def end(self) -> None:
        self._ended = True
        self.process.kill()

    @property
    def over(self) -> bool:
        return self._ended or self.process.poll() is not None

    @property
    def fruitless(self) -> int:
        return 0 if self.answered else self.before + self.over


COMMAND = (sys.executable, "-c", "from poise.engines.plugins.child import main; main()")


class Aside:
    """The process, and who asks it.

    Parameters
    ----------
    command : what starts it; another one in tests.
    """

    def __init__(self, command: Sequence[str] = COMMAND) -> None:
        self._command = tuple(command)
        self._child: _Child | None = None  # replaced whole: who asks looks at it while a thread starts the next
        self._turn = threading.Lock()
        self._end = object()  # the last one; who was asked before it is asked in vain

    @property
    def pid(self) -> int | None:
        """Of the process that runs, or was the last to run, if there was one."""
        return None if self._child is None else self._child.process.pid

    @property
    def answered(self) -> bool:
        """Whether the process that runs, or was the last to run, has answered."""
        return self._child is not None and self._child.answered

    @property
    def fruitless(self) -> int:
        """Processes in a row that are over, and never answered."""
        return 0 if self._child is None else self._child.fruitless

    def start(self) -> None:
        """Start the process if there is none, so that it compiles what it runs before it is asked."""
        if self._child is None and self._turn.acquire(blocking=False):
            try:
                self._started(self._end)
            finally:
                self._turn.release()

    def ask(self, asked: Asked) -> Future[Answer]:
        """The answer, when it comes; cancelled before its turn came, nothing is asked.

        It raises NoResultError if the planner could not answer, CommunicationError if its process ended before it did.
        """
        future: Future[Answer] = Future()
        words = asked, future, self._end
        threading.Thread(target=self._wait, args=words, name="poise-planner", daemon=True).start()
        return future

    def end(self) -> None:
        """End the process, also one that a thread is about to start, and with it all that is waited for."""
        self._end = object()  # first: who starts a process looks at it when the process is there to be ended
        child = self._child
        if child is not None:
            child.end()

    def close(self) -> None:
        """End the process, and let go of what it held."""
        self.end()
        with self._turn:
            if self._child is not None:
                _over(self._child.process)

    def _wait(self, asked: Asked, future: Future[Answer], end: object) -> None:
        with self._turn:
            if not future.set_running_or_notify_cancel():  # whoever asked no longer waits: no process for that
                return
            try:
                future.set_result(self._answer(asked, end))
            except BaseException as error:
                future.set_exception(error)

    def _started(self, end: object) -> _Child:
        last = self._child
        if last is None or last.over:
            if last is not None:
                _over(last.process)
            path = [os.environ.get("PYTHONPATH", ""), str(Path(__file__).parents[3])]
            environ = {**os.environ, **ENVIRON, "PYTHONPATH": os.pathsep.join(filter(None, path))}
            process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environ)
            self._child = _Child(process, 0 if last is None else last.fruitless)
            if end is not self._end:  # meanwhile, when there was only the one before to be ended
                self._child.end()
        assert self._child is not None
        return self._child

    def _answer(self, asked: Asked, end: object) -> Answer:
        if end is not self._end:
            raise CommunicationError("the planner's process was ended before this call came to it")
        child = self._started(end)
        process = child.process
        assert process.stdin is not None and process.stdout is not None
        try:
            pickle.dump(asked, process.stdin)
            process.stdin.flush()
            answer = pickle.load(process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            raise CommunicationError(f"the planner's process ended with exit code {_over(process)}") from error
        if not isinstance(answer, Answer):
            raise CommunicationError(f"the planner's process answered with {type(answer).__name__}, not with a map")
        child.answered = True
        if answer.table_LS is None:
            raise NoResultError(answer.said)
        return answer


def _over(process: subprocess.Popen[bytes]) -> int:
    """Kill a process; its exit code."""
    process.kill()
    code = process.wait()
    for pipe in (process.stdin, process.stdout):
        try:
            if pipe is not None:
                pipe.close()
        except OSError:  # what was not sent is lost with it
            pass
    return code
