"""A process for each class, forked after the imports of torch and transformers, with a time limit."""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any


def run_each(
    names: Iterable[Any], work: Callable[[Any], Any], jobs: int, limit_seconds: float
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """(name, `work(name)`, a dict) as they are done; {"failed": why} for one that crashes or takes too long."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([work.__module__])
    waiting = list(names)[::-1]
    running: dict[Connection, tuple[Any, Any, float]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                name = waiting.pop()
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_child, args=(theirs, work, name), daemon=True)
                process.start()
                theirs.close()
                running[ours] = (name, process, time.monotonic() + limit_seconds)
            ready = wait(list(running), timeout=1.0)
            for connection, (name, process, deadline) in list(running.items()):
                if connection in ready:
                    try:
                        result = connection.recv()
                    except EOFError:
                        process.join()
                        result = {"failed": f"the process ended with status {process.exitcode}"}
                elif time.monotonic() > deadline:
                    result = {"failed": f"not done after {limit_seconds:.0f} s"}
                else:
                    continue
                process.kill()
                process.join()
                connection.close()
                del running[connection]
                yield name, result
    finally:
        for _, process, _ in running.values():
            process.kill()


def _child(connection: Connection, work: Callable[[Any], Any], name: Any) -> None:
    # What models print is theirs; the record is not on these streams.
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    try:
        record = dict(work(name))
    except Exception:  # of the work itself: what models raise is in their records
        record = {"failed": traceback.format_exc(limit=-1).strip()}
    connection.send(record)
    connection.close()
