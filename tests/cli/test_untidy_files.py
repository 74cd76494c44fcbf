"""Each of the untidy checkpoints is aligned and merged rightly, or refused in one line with nothing written."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

from permgraph.cli.app import app
from tests.cli.untidy_files import CASES, prepare, table
from tests.cli.untidy_networks import SHAPES, TIED_SHAPES, Case, State, draw, near

ROUNDING = {torch.float16: 2e-3}
"""How far a number may be from what it was, as a part of itself, where a result is of another type than float32."""


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Case:
    """A case whose files lie in the current folder."""
    prepare(tmp_path, request.param)
    monkeypatch.chdir(tmp_path)
    made: Case = request.param
    return made


def files() -> dict[Path, bytes]:
    return {path: path.read_bytes() if path.is_file() else b"" for path in sorted(Path().rglob("*"))}


def run(command: str, case: Case, out: str) -> Any:
    return CliRunner().invoke(app, [command, case.a, case.b, "-m", case.model, "-o", out, *case.options])


def require_refusal(result: Any, said: str, before: dict[Path, bytes]) -> None:
    """Exit code 2, one line that says it, and a folder that is what it was."""
    assert result.exit_code == 2, f"{result.stdout}\n{result.stderr}"
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, result.stderr
    assert re.search(said, errors[0]), errors[0]
    assert result.stdout == ""
    after = files()
    assert {p for p in after if "__pycache__" not in p.parts} == {p for p in before if "__pycache__" not in p.parts}
    assert all(after[path] == content for path, content in before.items())


def read(path: Path) -> Any:
    """What a file of ours or a result holds, by no code of permgraph's; of a folder the safetensors, if it has any."""
    if path.is_dir():
        parts = sorted(path.glob("model*.safetensors")) or sorted(path.glob("*.bin"))
        return {key: tensor for part in parts for key, tensor in read(part).items()}
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=False)


def by_name(path: Path, case: Case, names: State) -> State:
    """A result's tensors in float32, by the model's names; the keys are all still those that B had."""
    content = read(path)
    for key in case.where:
        content = content[key]
    return {name: content[case.key(name)].float() for name in names}


def network(case: Case, state: State) -> nn.Module:
    spec = importlib.util.spec_from_file_location("untidy_net", "net.py")
    assert spec is not None and spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    net: nn.Module = getattr(module, case.model.partition(":")[2])()
    batches = {"norm.num_batches_tracked": torch.tensor(0)}
    net.load_state_dict(state | ({"head.weight": state["table.weight"]} if case.tied else batches))
    return net.eval()


def first(case: Case) -> State:
    """A's weights."""
    return draw(0, TIED_SHAPES if case.tied else SHAPES)


def second(case: Case) -> State:
    """B's weights as it has them, before its units were put in another order."""
    mixed = case.name.endswith("the norm in float32")
    return {n: t if mixed and "norm" in n else t.to(case.dtype).float() for n, t in near(first(case)).items()}


def test_align(case: Case) -> None:
    said, before = case.refusals[0], files()
    out = "out" if Path(case.b).is_dir() else "out" + "".join(Path(case.b).suffixes)
    result = run("align", case, out)
    if said is not None:
        require_refusal(result, said, before)
        assert not Path("trapped").exists()
        return
    assert result.exit_code == 0, f"{result.stdout}\n{result.stderr}"
    assert case.said in result.stderr
    a = first(case)
    moved = by_name(Path(out), case, a)
    for name, tensor in second(case).items():  # the units are back where they were, and no bit of theirs is changed
        assert torch.equal(moved[name], tensor), name
    x = torch.randint(9, (4, 5)) if case.tied else torch.randn(5, 6)
    given = network(case, by_name(Path(case.b), case, a))(x)
    torch.testing.assert_close(network(case, moved)(x), given, rtol=1e-5, atol=1e-5 * float(given.abs().max()))


def test_merge(case: Case) -> None:
    said, before = case.refusals[1], files()
    out = "out" if Path(case.a).is_dir() else "out" + "".join(Path(case.a).suffixes)
    result = run("merge", case, out)
    if said is not None:
        require_refusal(result, said, before)
        assert not Path("trapped").exists()
        return
    assert result.exit_code == 0, f"{result.stdout}\n{result.stderr}"
    merged, other = read(Path(out)), second(case)
    for name, tensor in first(case).items():  # the result is numbered as A is, and has A's types
        rounding = ROUNDING.get(merged[name].dtype, 1e-6)
        torch.testing.assert_close(merged[name].float(), (tensor + other[name]) / 2, rtol=rounding, atol=rounding)


def test_the_table_is_in_the_documentation() -> None:
    text = (Path(__file__).parents[2] / "docs" / "untidy.md").read_text()
    assert "\n".join(table()) in text
