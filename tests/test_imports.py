"""What is imported when: by modules and not by seconds, which depend on the machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

HEAVY = {"torch", "numpy", "scipy", "networkx", "safetensors", "matplotlib", "pandas", "sklearn", "lap"}

SHOW = """
import atexit, json, sys
atexit.register(lambda: print("MODULES", json.dumps(sorted(sys.modules))))
"""


def imported(code: str, **environment: str) -> tuple[set[str], str]:
    """The modules that a new process imports while it runs the code, and what it prints."""
    process = subprocess.run(
        [sys.executable, "-c", SHOW + code], capture_output=True, text=True, env={**os.environ, **environment}
    )
    printed, mark, modules = process.stdout.rpartition("MODULES ")
    assert mark, process.stderr
    return set(json.loads(modules)), printed


def command(*arguments: str) -> str:
    return f"import sys; sys.argv = ['permgraph', *{arguments!r}]\nfrom permgraph.cli import main\nmain()"


def test_the_package_alone_is_light() -> None:
    modules, _ = imported("import permgraph")
    assert not HEAVY & modules


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (("--help",), "--version"),
        (("--version",), "permgraph "),
        *(
            ((name, "--help"), "Usage")
            for name in (
                "spec",
                "explain",
                "diff",
                "verify",
                "align",
                "merge",
                "mergekit",
                "barrier",
                "study",
                "plan",
                "doctor",
            )
        ),
    ],
    ids=" ".join,
)
def test_help_imports_nothing_heavy(arguments: tuple[str, ...], shown: str) -> None:
    modules, printed = imported(command(*arguments))
    assert shown in printed
    assert not HEAVY & modules


@pytest.mark.parametrize(
    ("typed", "offered"), [("permgraph al", "align"), ("permgraph spec h", "hf:"), ("permgraph align --see", "--seed")]
)
def test_completion_imports_nothing_heavy(typed: str, offered: str) -> None:
    words = {"_PERMGRAPH_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))}
    modules, printed = imported(command(), **words)
    assert offered in printed
    assert not HEAVY & modules


def test_inference_imports_nothing_that_it_does_not_use() -> None:
    code = "import torch; before = set(sys.modules); import permgraph; permgraph.auto_spec"
    _, printed = imported(f"{code}; print(*set(sys.modules) - before)")
    new = set(printed.split())
    assert "permgraph.inference.auto_spec" in new
    assert not {name.partition(".")[0] for name in new} & (HEAVY - {"torch", "numpy", "safetensors"})
    packages = {name.split(".")[1] for name in new if name.startswith("permgraph.")}
    assert not packages & {"matching", "merging", "connectivity", "verification", "assignment", "networks"}
    assert not packages & {"studies", "cli", "pictures"}
