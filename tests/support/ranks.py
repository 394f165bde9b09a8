"""Ranks of ``torch.distributed`` for tests: threads of this process, or processes of their own.

Threads cost milliseconds, and compute all that processes compute. Processes are for what threads
cannot be: DistributedDataParallel, compilation, and the end of one of them.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import threading
import traceback
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch.testing._internal.distributed import multi_threaded_pg
from torch.testing._internal.distributed.multi_threaded_pg import ProcessLocalGroup

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection
    from pathlib import Path

Result = TypeVar("Result")


@dataclass(frozen=True)
class Collective:
    """A collective of one rank.

    Attributes:
        name: ``allreduce`` or ``allgather``.
        numel: how many numbers the rank gives.
        dtype: of these.
    """

    name: str
    numel: int
    dtype: torch.dtype


class _Recorder(threading.local):
    """The collectives of a thread."""

    def __init__(self) -> None:
        self.collectives: list[Collective] = []


_recorder = _Recorder()


def collectives() -> list[Collective]:
    """Those of this rank so far, in their order; for ranks of :func:`on_threads`."""
    return list(_recorder.collectives)


def _recorded(name: str) -> Callable[..., Any]:
    method = getattr(ProcessLocalGroup, name)

    def call(self: Any, *arguments: Any) -> Any:
        # The tensors that are given are the last before the options.
        given = next(a for a in reversed(arguments) if isinstance(a, list))[0]
        _recorder.collectives.append(Collective(name, given.numel(), given.dtype))
        return method(self, *arguments)

    return call


for _name in ("allreduce", "allgather"):
    setattr(ProcessLocalGroup, _name, _recorded(_name))


def on_threads(world: int, function: Callable[[int], Result]) -> list[Result]:
    """Calls a function with each rank, all at once, and returns what it returns.

    Raises:
        BaseException: what one of them raised; the others end, too, wherever they wait for it.
    """
    results: dict[int, Result] = {}
    errors: list[BaseException] = []
    store = dist.HashStore()  # type: ignore[attr-defined]

    def run(rank: int) -> None:
        dist.init_process_group("threaded", rank=rank, world_size=world, store=store)
        try:
            results[rank] = function(rank)
        except BaseException as error:  # SystemExit is how those end that wait
            errors.append(error)
            ProcessLocalGroup.exception_handle(error)
        finally:
            # Threads of torch 2.11 have no list of communicators that this could go through.
            with suppress(AttributeError):
                dist.destroy_process_group()

    set_isolation = torch._C._distributed_c10d._set_thread_isolation_mode  # type: ignore[attr-defined]
    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    set_isolation(True)
    ProcessLocalGroup.reset()
    multi_threaded_pg._install_threaded_pg()
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        multi_threaded_pg._uninstall_threaded_pg()
        set_isolation(False)
    if errors:
        raise min(errors, key=lambda error: isinstance(error, SystemExit))
    return [results[rank] for rank in range(world)]


class ProcessError(Exception):
    """What a rank raised, with its traceback."""


class Processes:
    """Processes with gloo that run one function after another; see :meth:`__call__`.

    What they are sent and answer is pickled here, as connections would share memory of tensors.
    """

    def __init__(self, folder: Path, world: int = 2, timeout: int = 30) -> None:
        context = multiprocessing.get_context("spawn")
        self._connections: list[Connection] = []
        self._processes = []
        for rank in range(world):
            ours, theirs = context.Pipe()
            arguments = (theirs, str(folder / "store"), rank, world, timeout)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)

    def __call__(self, function: Callable[..., Result], *arguments: object) -> list[Result]:
        """Has each rank call a function of a module's top level with the rank and arguments.

        Returns:
            What they returned, in the order of ranks.

        Raises:
            ProcessError: one of them raised.
        """
        answers = self.answers(function, *arguments)
        for rank, answer in enumerate(answers):
            if isinstance(answer, ProcessError):
                raise ProcessError(f"rank {rank}: {answer}")
        return answers

    def answers(self, function: Callable[..., Any], *arguments: object) -> list[Any]:
        """The same, errors included; None of those that ended meanwhile."""
        for connection in self._connections:
            connection.send_bytes(pickle.dumps((function, arguments)))
        answers = []
        for connection in self._connections:
            try:
                answers.append(pickle.loads(connection.recv_bytes()))
            except EOFError:
                answers.append(None)
        return answers

    def close(self) -> None:
        """Ends them."""
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.join(10)
            process.kill()


def _serve(connection: Connection, store: str, rank: int, world: int, timeout: int) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=timeout),
    )
    while True:
        try:
            function, arguments = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        try:
            answer = function(rank, *arguments)
        except Exception:  # of any kind: the test asked for it
            answer = ProcessError(traceback.format_exc())
        connection.send_bytes(pickle.dumps(answer))
