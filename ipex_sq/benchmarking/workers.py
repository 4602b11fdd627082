"""Processes that prepare a model once and run it when told to.

Each model lives in a process of its own, so that no other changes its speed, and stays there while
the others have their turn.
"""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import torch

from ipex_sq.benchmarking.cores import pinned
from ipex_sq.errors import IpexSqError, ResourceError
from ipex_sq.logs import quiet_libraries

PATIENCE_S = 10.0
"""Time that an idle process gets to end."""


class Worker:
    """A process that holds one object and calls its methods.

    Args:
        name: For error messages.
        factory: Makes the object, in the process; picklable.
        cores: That it is meant to use, with a thread on each.
        bind: Whether it may use no others.
    """

    def __init__(
        self, name: str, factory: Callable[[], Any], cores: Sequence[int], *, bind: bool = True
    ) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, factory, len(cores)), daemon=True
        )
        with pinned(cores) if bind else nullcontext():
            self._process.start()
        theirs.close()

    def ready(self) -> None:
        """Wait until the object is made; raises what making it raised."""
        self.receive()

    def send(self, method: str, *arguments: Any) -> None:
        """Start a method; `receive` gives what it returns.

        Raises:
            ResourceError: The process died while it waited.
        """
        try:
            self._connection.send((method, arguments))
        except ConnectionError as gone:
            raise self._died() from gone

    def receive(self) -> Any:
        """What the method that was sent returned.

        Raises:
            IpexSqError: As the method raised it.
            ResourceError: The process died.
            RuntimeError: Any other exception, with its traceback.
        """
        try:
            value, error, trace = self._connection.recv()
        except (EOFError, ConnectionError) as gone:
            raise self._died() from gone
        if isinstance(error, IpexSqError):
            raise error
        if error is not None:
            raise RuntimeError(f"{self.name}: {error}\n{trace}")
        return value

    def call(self, method: str, *arguments: Any) -> Any:
        """Send and receive."""
        self.send(method, *arguments)
        return self.receive()

    def _died(self) -> ResourceError:
        self._process.join()
        return ResourceError(
            f"the process of {self.name} died (exit code {self._process.exitcode}): it was "
            "killed, or memory ran out"
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the process, by force where it is busy."""
        self._connection.close()
        self._process.join(PATIENCE_S)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()


def _serve(connection: Connection, factory: Callable[[], Any], threads: int) -> None:
    """Make the object, say so, and answer until the other end closes."""
    quiet_libraries()
    # Else the environment of who started the benchmark decides; peers take torch's number.
    torch.set_num_threads(threads)
    made: list[Any] = []
    try:
        _answer(connection, lambda: made.append(factory()))
        while made:
            method, arguments = connection.recv()
            _answer(connection, lambda: getattr(made[0], method)(*arguments))  # noqa: B023
    except (EOFError, ConnectionError):  # the other end has closed: nobody waits for an answer
        return


def _answer(connection: Connection, work: Callable[[], Any]) -> None:
    try:
        connection.send((work(), None, ""))
    except Exception as error:  # noqa: BLE001  # it is raised again in the process that asked
        known = error if isinstance(error, IpexSqError) else repr(error)
        connection.send((None, known, traceback.format_exc()))
