"""Break every rule by hand, one tie at a time, and see whether the table of cases notices.

Run by hand: ``python -m tests.rules.mutate``. Each word that a rule says is changed in turn: a label is renamed in one
tensor of a link, its ``!`` is dropped, a ``via`` is dropped, a tensor is left out; a call of `pin`, `pin_values`,
`carry_values`, `take`, `move` or another word is left out. A mutant is
killed by a case of the table whose axes or verdict differ. ``docs/rules-mutations.md`` keeps the outcome.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch._ops import OpOverload

from permgraph.rules.call import Call
from permgraph.rules.typed_tensor import TypedTensor
from permgraph.verification import rule as check
from permgraph.verification.example import Example
from permgraph.verification.examples import EXAMPLES
from permgraph.verification.witness import denied

WORDS = (
    "pin", "pin_all", "pin_values", "carry_values", "share_values", "take", "take_every", "move", "regroup",
    "concatenate", "pad", "unify", "number_dims",
)  # fmt: skip


@dataclass(frozen=True)
class Site:
    """A line of a rule, and the word that it says there."""

    file: str
    function: str
    line: int
    word: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.function}"


@dataclass(frozen=True)
class Mutant:
    """One change at one site: `what` says which, in words."""

    site: Site
    what: str
    slot: int = -1
    token: str = ""

    def __str__(self) -> str:
        return f"{self.site}: {self.what}"


def caller() -> tuple[str, str, int] | None:
    """The innermost line of a rule on the stack."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name.startswith("permgraph.rules.") and name.rpartition(".")[2] not in ("call", "pattern"):
            return name.rpartition(".")[2] + ".py", frame.f_code.co_name, frame.f_lineno
        if name in ("permgraph.inference.fixpoint",):
            return None
        frame = frame.f_back  # type: ignore[assignment]
    return None


class Mutator:
    """Stands in for the words of `Call`: notes what is said where, and changes what the mutant says."""

    def __init__(self, mutant: Mutant | None) -> None:
        self.mutant = mutant
        self.possible: dict[Mutant, None] = {}
        self.depth = 0

    @contextmanager
    def active(self) -> Iterator[None]:
        with patch.object(Call, "link", self._link(Call.link)):
            patches = [patch.object(Call, word, self._word(word, getattr(Call, word))) for word in WORDS]
            for entered in patches:
                entered.start()
            try:
                yield
            finally:
                for entered in patches:
                    entered.stop()

    def _word(self, word: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def said(owner: Any, *args: Any, **kwargs: Any) -> Any:
            where = caller() if self.depth == 0 else None
            if where is not None:
                mutant = Mutant(Site(*where, word), f"without `{word}`")
                self.possible[mutant] = None
                if mutant == self.mutant:
                    return None
            self.depth += 1
            try:
                return original(owner, *args, **kwargs)
            finally:
                self.depth -= 1

        return said

    def _link(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def said(owner: Call, *slots: tuple[TypedTensor | None, str], via: Any = (), **kwargs: Any) -> Any:
            where = caller() if self.depth == 0 else None
            if where is not None:
                slots, via = self._change(Site(*where, "link"), slots, via)
                given = {label for tensor, pattern in slots if tensor is not None for label in labels(pattern)}
                if self.mutant is not None and "mutated" in given:  # still a link that can be read
                    via = [" ".join(t for t in tokens(p) if t in given or t == "...") for p in via]
                    if self.mutant.token in kwargs:
                        kwargs["mutated"] = kwargs[self.mutant.token]
                    kwargs = {name: value for name, value in kwargs.items() if name == "why" or name in given}
            self.depth += 1
            try:
                return original(owner, *slots, via=via, **kwargs)
            finally:
                self.depth -= 1

        return said

    def _change(self, site: Site, slots: Any, via: Any) -> tuple[Any, Any]:
        shared = Counter(label for tensor, p in slots if tensor is not None for label in set(labels(p)))
        changed = list(slots)
        patterns = [p for tensor, p in slots if tensor is not None]
        # Where a label is pinned wherever it stands, the tie says nothing more, and one of the pins would be enough.
        pinned = {t[:-1] for p in patterns for t in tokens(p) if t.endswith("!")}
        for label in sorted(pinned):
            mutant = Mutant(site, f"`{label}!` not pinned")
            self.possible[mutant] = None
            if mutant == self.mutant:
                changed = [(tensor, without(pattern, label)) for tensor, pattern in changed]
        for k, (tensor, pattern) in enumerate(slots):
            if tensor is None:
                continue
            for label in dict.fromkeys(labels(pattern)):
                if label not in pinned and (label == "..." or shared[label] > 1):
                    self._offer(Mutant(site, f"`{label}` of tensor {k} renamed", k, label), changed)
        for k in range(len(via)):
            mutant = Mutant(site, f"without via number {k}")
            self.possible[mutant] = None
            if mutant == self.mutant:
                via = [p for i, p in enumerate(via) if i != k]
        return tuple(changed), via

    def _offer(self, mutant: Mutant, slots: list[Any]) -> None:
        self.possible[mutant] = None
        if mutant == self.mutant:
            tensor, pattern = slots[mutant.slot]
            slots[mutant.slot] = tensor, renamed(pattern, mutant.token, tensor.ndim)


def tokens(pattern: str) -> list[str]:
    return pattern.replace("(", " ( ").replace(")", " ) ").replace(";", " ; ").split()


def labels(pattern: str) -> list[str]:
    """The labels of a pattern, without their marks."""
    return [token.rstrip("!") for token in tokens(pattern) if token not in ("(", ")", ";", "_", "!")]


def without(pattern: str, label: str) -> str:
    """The pattern with one label no longer pinned."""
    return " ".join(label if token == f"{label}!" else token for token in tokens(pattern))


def renamed(pattern: str, token: str, ndim: int) -> str:
    """The pattern with one label renamed."""
    if token == "...":
        rest = [t for t in pattern.partition(";")[0].split() if t != "..."]
        fresh = " ".join(f"mutated{i}" for i in range(ndim - len(rest)))
        return pattern.replace("...", fresh)
    return " ".join("mutated" if t == token else t for t in tokens(pattern))


def survives(mutant: Mutant, cases: list[Example]) -> bool:
    """Whether no case notices."""
    for case in cases:
        mutator = Mutator(mutant)
        try:
            with mutator.active():
                report = case.check()
        except Exception:
            return False
        if case.problem(report) is not None:
            return False
    return True


def main() -> None:
    """Try every mutant, and print the survivors."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="a part of the file names to try")
    options = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    where: dict[Mutant, list[Example]] = defaultdict(list)
    for case in EXAMPLES:
        mutator = Mutator(None)
        with mutator.active():
            attempt_only(case)
        for mutant in mutator.possible:
            if options.only in mutant.site.file:
                where[mutant].append(case)
    tried: Counter[str] = Counter()
    survivors: list[Mutant] = []
    with patch.object(check, "denied", quick):
        for mutant, cases in where.items():
            tried[mutant.site.file] += 1
            if survives(mutant, sorted(cases, key=lambda case: isinstance(case.op, OpOverload))):
                survivors.append(mutant)
                print("survived:", mutant, f"({len(cases)} cases)", flush=True)
    print(f"{sum(tried.values())} mutants, {len(survivors)} survived, {time.perf_counter() - started:.0f} s")
    for file, count in sorted(tried.items()):
        print(f"  {file}: {count} tried, {sum(s.site.file == file for s in survivors)} survived")


def attempt_only(case: Example) -> None:
    """Let the rules run, without the tests of the law."""
    case.operators()


def quick(trial: Any) -> Any:
    """The first witness is enough."""
    for problem in denied(trial):
        return [problem]
    return []


if __name__ == "__main__":
    main()
