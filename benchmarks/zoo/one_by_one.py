"""Models of a zoo looked at one after the other, each in a process of its own that may take so long and no longer."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from torch import nn

import permgraph as pg
from benchmarks.zoo.names import ZOOS
from benchmarks.zoo.sweep import warm_up
from permgraph.errors import PermgraphError

T = TypeVar("T")


def inferred(zoo: str, name: str, **options: Any) -> tuple[nn.Module, pg.PermutationSpec]:
    """The model of a zoo, in the first way in which it can be captured, and its spec."""
    last: Exception = ValueError(f"there is no model {name}")
    for model in ZOOS[zoo].build(name):
        try:
            return model, pg.auto_spec(model.eval(), **options)
        except PermgraphError as error:
            last = error
    raise last


def one_by_one(
    look: Callable[[str, str], T], zoo: str, names: Sequence[str] | None, seconds: float, total: float
) -> Iterator[tuple[str, T | str]]:
    """What `look` says of model after model, until the time is up; a sentence where it said nothing."""
    warm_up()
    started = time.monotonic()
    for name in names or ZOOS[zoo].names():
        if time.monotonic() - started > total:
            return
        yield name, _in_process(look, zoo, name, seconds)


def _in_process(look: Callable[[str, str], T], zoo: str, name: str, seconds: float) -> T | str:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    worker = context.Process(target=_work, args=(sender, look, zoo, name), daemon=True)
    worker.start()
    sender.close()
    try:
        found: T | str = receiver.recv() if receiver.poll(seconds) else f"stopped after {seconds:.0f} s"
    except EOFError:
        found = "the process ended"
    if worker.is_alive():
        worker.kill()
    worker.join()
    return found


def _work(sender: Connection, look: Callable[[str, str], Any], zoo: str, name: str) -> None:
    try:
        sender.send(look(zoo, name))
    except Exception as error:
        sender.send(f"{type(error).__name__}: {str(error)[:200]}")
