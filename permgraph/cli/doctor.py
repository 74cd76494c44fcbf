"""``permgraph doctor``: what is installed, what the machine has, and whether the library works here."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from typing import Any

import typer

import permgraph
from permgraph.cli.options import Shown
from permgraph.cli.screen import SAYS_NO, Screen, table

NEEDED = ("torch", "numpy", "scipy", "networkx", "safetensors", "lapx")
OPTIONAL = {
    "typer": "cli",
    "rich": "cli",
    "matplotlib": "plots",
    "scikit-learn": "demo",
    "torchvision": "zoo",
    "timm": "zoo",
    "transformers": "zoo",
    "mergekit": "mergekit",
    "flwr": "federated",
}


def doctor(shown: Shown) -> None:
    """Show versions, optional packages and devices, and try the library on a small network. Exit code 1 if it fails.

    [bold]Example[/bold]

        permgraph doctor --json
    """
    import torch

    with Screen(shown) as screen:
        versions = {name: _version(name) for name in (*NEEDED, *OPTIONAL)}
        with screen.stage("trying it out"):
            trial = _trial()
        machine: dict[str, Any] = {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "permgraph": permgraph.__version__,
            "devices": _devices(),
            "threads": torch.get_num_threads(),
            "memory_gb": _memory(),
            "disk_free_gb": round(shutil.disk_usage(os.getcwd()).free / 1e9, 1),
        }
        healthy = trial == "works" and all(versions[name] for name in NEEDED)
        rows = [(name, _shown(value)) for name, value in machine.items()]
        rows += [(name, versions[name] or "MISSING") for name in NEEDED]
        rows += [
            (name, versions[name] or f"not installed: pip install 'permgraph[{extra}]'")
            for name, extra in OPTIONAL.items()
        ]
        rows.append(("capture, align, verify", trial))
        screen.result({"healthy": healthy, **machine, "packages": versions, "trial": trial}, table(rows))
        if not healthy:
            raise typer.Exit(SAYS_NO)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[str]:
    import torch

    found = ["cpu"]
    found += [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    return found + (["mps"] if torch.backends.mps.is_available() else [])


def _memory() -> float | None:
    if not hasattr(os, "sysconf") or sys.platform == "win32":
        return None
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "unknown" if value is None else str(value)


def _trial() -> str:
    """Scramble a small network, bring it back, and prove its spec."""
    import torch

    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        spec = permgraph.auto_spec(network)
        state = network.state_dict()
        fit = permgraph.align(state, spec.random(0, every_group=True).apply(state), spec=spec)
        back = all(torch.equal(fit.state_dict[name], tensor) for name, tensor in state.items())
        proved = back and permgraph.verify(network, spec).passed
        return "works" if proved else "FAILED: a scrambled network was not brought back"
    except Exception as error:
        return f"FAILED: {type(error).__name__}: {error}"
