"""How a run ended and how it reports on the way: the words that all of the package shares.

A search (a matcher, a merging method) calls ``progress(record)`` with a record of each pass, a `Sweep` or a `Round`.
What counts its steps (training, evaluation, a study) calls ``progress(done, total)``. Either is called after the step,
in the thread that made it; what it returns is ignored, and what it raises ends the run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

Outcome: TypeAlias = Literal["converged", "sweep limit", "interrupted"]
"""Of a search. "converged": no further step helps; "sweep limit": it may go on where it stopped, if more passes are
allowed; "interrupted": by the keyboard, and this is the best so far."""

TrainingOutcome: TypeAlias = Literal["done", "interrupted"]
"""Of a training. "done": all epochs were run; "interrupted": by the keyboard, and this is what was reached."""

CellStatus: TypeAlias = Literal["done", "failed", "missing"]
"""Of a cell of a study. "failed": it raised, and its record has the error; "missing": it has not been run."""

StepProgress: TypeAlias = Callable[[int, int], object]
"""Called as ``progress(done, total)`` after each step."""
