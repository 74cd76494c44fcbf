"""Who brings rules: this package, the user, and other packages; and an operator of the user's own, end to end."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import subprocess
import sys
import textwrap
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import permgraph as pg
from permgraph.rules import find_rule, registry, rule, rule_name

library = torch.library.Library("permgraph_user", "DEF")
library.define("scale_channels(Tensor x, Tensor scale) -> Tensor")
library.define("mix_(Tensor(a!) x, Tensor y) -> Tensor(a!)")


def _scale_channels(x: Tensor, scale: Tensor) -> Tensor:
    return x * scale[:, None]


library.impl("scale_channels", _scale_channels, "CompositeExplicitAutograd")
library.impl("scale_channels", _scale_channels, "Meta")


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """The table of rules as it was, entry points not yet loaded."""
    before = dict(registry._rules)
    registry.load_entry_points.cache_clear()
    yield
    registry._rules.clear()
    registry._rules.update(before)
    registry.load_entry_points.cache_clear()


def test_names_from_the_most_special_to_the_twin() -> None:
    assert rule_name("aten.add_.Tensor") == "aten.add"
    assert rule_name("aten.repeat_interleave.self_int") == "aten.repeat_interleave.self_int"
    assert rule_name("aten.repeat_interleave.self_Tensor") is None
    assert rule_name("aten.__and__.Tensor") == "aten.__and__"
    assert rule_name("mylib.add.Tensor") is None

    @rule("aten.add.Scalar", "permgraph_user.mix")
    def special(call: Any) -> None:
        """Only for scalars."""

    assert find_rule("aten.add.Scalar") is special
    assert find_rule("aten.add_.Scalar") is special
    assert find_rule("aten.add.Tensor") is not special
    assert find_rule("permgraph_user.mix_.default") is special


class Scaled(nn.Module):
    """A hidden layer whose channels are scaled by an operator of the user's."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv1d(3, 5, 2), nn.Conv1d(5, 2, 2)
        self.scale = nn.Parameter(torch.rand(5))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.ops.permgraph_user.scale_channels(self.first(x).relu(), self.scale)
        return self.last(hidden)


def test_an_operator_without_a_rule_pins_and_is_listed() -> None:
    spec = pg.auto_spec(Scaled(), (torch.randn(2, 3, 7),))
    assert dict(spec.moving) == {}
    assert [op.operator for op in spec.unknown_ops] == ["permgraph_user.scale_channels.default"]


def test_an_operator_of_the_users_own() -> None:
    @rule("permgraph_user.scale_channels")
    def scale_channels(call: Any) -> None:
        call.link((call["x"], "n c ..."), (call["scale"], "c"), (call.out, "n c ..."))

    operator = torch.ops.permgraph_user.scale_channels.default
    report = pg.check_rule(operator, torch.randn(2, 3, 5).double(), torch.randn(3).double())
    assert report.passed, str(report)
    assert report.matches("(n c s), (c) -> (n c s) where n per c, s per c n")

    model = Scaled().double()
    spec = pg.auto_spec(model, (torch.randn(2, 3, 7).double(),))
    assert spec.unknown_ops == ()
    assert [(group.size, group.parents) for group in spec.moving.values()] == [(5, ())]
    (group,) = spec.moving
    assert {name for name, _ in spec.uses(group)} == {"first.weight", "first.bias", "last.weight", "scale"}
    x = torch.randn(2, 3, 7).double()
    before = model(x)
    permuted = spec.random(0, every_group=True).apply(model.state_dict())
    assert not torch.equal(permuted["scale"], model.scale)
    torch.testing.assert_close(torch.func.functional_call(model, permuted, (x,)), before)


def _entry_point(monkeypatch: pytest.MonkeyPatch, *entries: importlib.metadata.EntryPoint) -> None:
    def entry_points(*, group: str) -> tuple[importlib.metadata.EntryPoint, ...]:
        return tuple(entry for entry in entries if entry.group == group)

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)


def test_entry_points_are_loaded_once_and_late(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []

    class Finder:
        """Finds a package that is not installed; importing it registers a rule."""

        def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
            return importlib.machinery.ModuleSpec(name, self) if name == "permgraph_fake_plugin" else None

        def create_module(self, spec: Any) -> None:
            return None

        def exec_module(self, module: types.ModuleType) -> None:
            loaded.append(module.__name__)
            rule("fakelib.op")(lambda call: None)

    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    entry = importlib.metadata.EntryPoint("fake", "permgraph_fake_plugin", "permgraph.rules")
    other = importlib.metadata.EntryPoint("other", "permgraph_fake_other", "somebody.elses")
    _entry_point(monkeypatch, entry, other)
    assert loaded == []
    assert find_rule("fakelib.op.default") is not None
    assert find_rule("fakelib.op.default") is not None
    assert loaded == ["permgraph_fake_plugin"]
    sys.modules.pop("permgraph_fake_plugin", None)


PLUGIN = """
from permgraph import rule


@rule("permgraph_plugin.gate")
def gate(call):
    call.link((call["x"], "n c"), (call["scale"], "c"), (call.out, "n c"))
"""


def test_an_installed_package_brings_its_rules(tmp_path: Path) -> None:
    """In a new process, with the package where pip would put it: one module, and the metadata of a distribution."""
    (tmp_path / "permgraph_plugin_rules.py").write_text(PLUGIN)
    metadata = tmp_path / "permgraph_plugin-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: permgraph-plugin\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[permgraph.rules]\nplugin = permgraph_plugin_rules\n")
    script = """
        import sys, torch, permgraph as pg
        from torch import nn

        library = torch.library.Library("permgraph_plugin", "DEF")
        library.define("gate(Tensor x, Tensor scale) -> Tensor")
        library.impl("gate", lambda x, scale: x * scale, "CompositeExplicitAutograd")

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b, self.scale = nn.Linear(3, 5), nn.Linear(5, 2), nn.Parameter(torch.ones(5))

            def forward(self, x):
                return self.b(torch.ops.permgraph_plugin.gate(self.a(x), self.scale))

        assert "permgraph_plugin_rules" not in sys.modules
        spec = pg.auto_spec(Model(), (torch.randn(2, 3),))
        assert not spec.unknown_ops and [group.size for group in spec.moving.values()] == [5], spec
        assert pg.verify(Model(), spec, (torch.randn(2, 3),))
        gate = torch.ops.permgraph_plugin.gate.default
        report = pg.check_rule(gate, torch.randn(2, 3).double(), torch.randn(3).double())
        print(report.verdict, report.axes)
    """
    paths = [str(tmp_path), str(Path(pg.__file__).parents[1])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("ok (a b), (b) -> (a b)")


def test_an_entry_point_that_fails_is_logged(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    _entry_point(monkeypatch, importlib.metadata.EntryPoint("broken", "permgraph_no_such_module", "permgraph.rules"))
    with caplog.at_level(logging.WARNING):
        assert find_rule("aten.mm.default") is not None
    assert "broken (permgraph_no_such_module) could not be loaded" in caplog.text
