"""``permgraph rules``: the table, and the checker, with its exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import permgraph as pg
from permgraph.cli.app import app
from permgraph.rules import Call, registry, rule

OWN = """
import torch
import permgraph as pg

library = torch.library.Library("permgraph_{name}", "FRAGMENT")
library.define("gate(Tensor x, Tensor scale, int times=1) -> Tensor")
library.impl("gate", lambda x, scale, times=1: x * scale ** times, "CompositeExplicitAutograd")


@pg.rule("permgraph_{name}.gate", values="product")
def gate(call):
    call.link({link})
"""
RIGHT = '(call["x"], "n c"), (call["scale"], "c"), (call.out, "n c")'
WRONG = '(call["x"], "n c"), (call["scale"], "d"), (call.out, "n c")'


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    """The table of rules as it was."""
    before = dict(registry._rules)
    yield
    registry._rules.clear()
    registry._rules.update(before)


def _run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["rules", *arguments])
    return result.exit_code, result.stdout, result.stderr


def _own(folder: Path, name: str, link: str) -> str:
    path = folder / f"{name}.py"
    path.write_text(OWN.format(name=name, link=link))
    return str(path)


def test_a_list_by_pattern() -> None:
    code, out, _ = _run("list", "aten.*_pool2d")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[1:]] == [
        "aten._adaptive_avg_pool2d", "aten.adaptive_avg_pool2d", "aten.adaptive_max_pool2d", "aten.avg_pool2d",
        "aten.fractional_max_pool2d", "aten.max_pool2d",
    ]  # fmt: skip
    assert "values='derived'" in out and "pooling.py:" in out
    assert _run("list", "no such thing")[0] == 1


def test_the_list_as_json_is_that_of_the_library() -> None:
    code, out, _ = _run("list", "--json", "relu")
    entries = json.loads(out)["rules"]
    assert code == 0
    assert [entry["name"] for entry in entries] == [entry.name for entry in pg.list_rules("relu")]
    (relu,) = [entry for entry in entries if entry["name"] == "aten.relu"]
    assert relu["declared"] == {"values": "repeat", "zeros": "all", "acts": "homogeneous"}
    file, _, line = relu["place"].rpartition(":")
    assert "@rule" in Path(file).read_text().splitlines()[int(line) - 1]


def test_a_right_rule_of_torchs() -> None:
    code, out, _ = _run("check", "aten.addmm")
    assert code == 0
    assert "addmm: (a), (b c), (c a) -> (b a): ok" in out
    assert out.splitlines()[-1].endswith(" calls, 0 wrong")


def test_functions_that_call_the_operator_are_examples_too() -> None:
    code, out, _ = _run("check", "aten.gather", "--json")
    assert code == 0
    assert {"gather", "gather by topk"} <= {call["call"] for call in json.loads(out)["calls"]}


def test_a_wrong_rule_of_torchs() -> None:
    @rule("aten.mm")
    def _(call: Call) -> None:
        call.link((call["self"], "m k"), (call["mat2"], "j o"), (call.out, "m o"))

    code, out, _ = _run("check", "aten.mm")
    assert code == 1
    assert "incorrect: moving dimension" in out


@pytest.mark.parametrize(("link", "name", "code", "said"), [(RIGHT, "right", 0, ": ok"), (WRONG, "wrong", 1, "incorr")])
def test_an_operator_of_ones_own(tmp_path: Path, link: str, name: str, code: int, said: str) -> None:
    path = _own(tmp_path, name, link)
    got, out, err = _run(
        "check", f"permgraph_{name}.gate", "--load", path, "-i", "2,3", "-i", "3", "--argument", "times=2"
    )
    assert (got, said in out) == (code, True), out + err


def test_what_to_pass_for_an_operator_without_an_example(tmp_path: Path) -> None:
    code, _, err = _run("check", "permgraph_asked.gate", "--load", _own(tmp_path, "asked", RIGHT))
    assert code == 2
    assert "there is no example of permgraph_asked.gate" in err
    assert "--input SHAPE (x) --input SHAPE (scale)" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["aten.no_such"], "aten.no_such has no rule"),
        ([], "give one operator"),
        (["aten.mm", "--all"], "give one operator"),
        (["aten.mm", "-i", "2,3", "-i", "5,2"], "does not run on these"),
        (["aten.mm", "-i", "2,3", "-i", "3,2", "-i", "1"], "takes 2 tensors"),
        (["aten.mm", "-i", "2,3", "-i", "3,2", "--argument", "dim=1"], "has no argument dim"),
        (["aten.mm", "-i", "2,3", "-i", "3,2", "--argument", "dim=(("], "give name=value"),
        (["nowhere.op", "-i", "2,3"], "there is no operator nowhere.op"),
        (["aten.cudnn_batch_norm"], "runs on a GPU only"),
        (["aten.mm", "--load", "no_such_file.py"], "no such Python file"),
    ],
)
def test_bad_input(arguments: list[str], said: str) -> None:
    code, _, err = _run("check", *arguments)
    assert code == 2
    assert said in err


def test_the_module_of_the_command_imports_no_torch_of_its_own() -> None:
    script = (
        "import sys, types; from pathlib import Path\n"
        "import permgraph.cli\n"
        "for name in ('options', 'screen'):\n"
        "    sys.modules['permgraph.cli.' + name] = module = types.ModuleType(name)\n"
        "    module.Shown = module.Screen = module.table = object; module.spread = lambda f: f; module.SAYS_NO = 1\n"
        "import permgraph.cli.rules; print('torch' in sys.modules)\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


def test_torch_is_what_the_examples_run_on() -> None:
    entry = next(entry for entry in pg.list_rules("aten.mm") if entry.name == "aten.mm")
    assert entry.properties.factors == (("self", -1), ("mat2", -2))
    assert all(hasattr(torch.ops.aten, e.name.split(".")[1]) for e in pg.list_rules("aten.*addmm"))
