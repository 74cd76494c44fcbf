"""The command line: ``permgraph``, and what `permgraph.cli.app` lists after it."""

from __future__ import annotations

import importlib.util
import os
import sys

SPINNING = {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "0"}
"""How long a thread of OpenMP waits busily for others: some 50 microseconds, and none, in place of many thousands."""


def main() -> None:
    """Run the command line on ``sys.argv``; exit 0 for success, 1 where the answer is no, 2 for bad input."""
    missing = [name for name in ("typer", "rich") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"error: the command line needs {' and '.join(missing)}: pip install 'permgraph[cli]'", file=sys.stderr)
        raise SystemExit(2)
    if "OMP_WAIT_POLICY" not in os.environ:
        for name, value in SPINNING.items():  # read once, when torch is loaded
            os.environ.setdefault(name, value)
    from permgraph.cli.app import app

    app()
