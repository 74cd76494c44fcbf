"""Where Flower is not installed, its strategies say what to install."""

from __future__ import annotations

import importlib
import sys

import pytest
from torch import nn

import permgraph.merging
from permgraph.errors import MissingExtraError


def test_without_flower_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    importlib.import_module("permgraph.merging.flower")
    monkeypatch.setattr(permgraph.merging, "flower", None)  # and what stands there now is put back afterwards
    for name in [name for name in sys.modules if name.partition(".")[0] == "flwr"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "flwr", None)
    monkeypatch.delitem(sys.modules, "permgraph.merging.flower")
    without = importlib.import_module("permgraph.merging.flower")
    for strategy in (without.AlignedFedAvg, without.AlignedMessageFedAvg):
        with pytest.raises(MissingExtraError, match=r"pip install 'permgraph\[federated\]'"):
            strategy(nn.Linear(2, 2))
