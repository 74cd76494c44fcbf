"""Whatever is wrong with a checkpoint: one line, exit code 2, no output, no traceback, and nothing of it is run."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from permgraph.cli.app import app
from permgraph.cli.models import spec_of

NET = f"{Path(__file__).with_name('networks.py')}:Net(6, depth=2)"
FUZZ = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@pytest.fixture
def good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with net.json, and checkpoints a (a file), and b (a folder with shards and an index)."""
    monkeypatch.chdir(tmp_path)
    spec = spec_of(NET)
    spec.save("net.json")
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(shape, generator=generator) for name, shape in spec.shapes.items()}
    save_file(state, "a.safetensors", {"format": "pt"})
    torch.save(state, "a.pt")
    Path("b").mkdir()
    placed = {}
    for number, part in enumerate((list(state)[:3], list(state)[3:])):
        save_file({name: state[name] for name in part}, f"b/part{number}.safetensors", {"format": "pt"})
        placed.update(dict.fromkeys(part, f"part{number}.safetensors"))
    Path("b/model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def refused_or_harmless(good: Path, bad: str, command: str) -> bool:
    """Run a command on a damaged checkpoint, and check all that is promised; whether it was refused."""
    before = contents(good)
    other = "a.safetensors" if bad == "b" else "b"

    def like(name: str) -> str:
        return "c" + Path(name).suffix

    args = {
        "align to it": ["align", bad, other, "-o", like(other)],
        "align it": ["align", other, bad, "-o", like(bad)],
        "stream it": ["align", other, bad, "-o", like(bad), "--stream"],
        "merge it": ["merge", other, bad, other, "-o", like(other)],
    }[command]
    result = CliRunner().invoke(app, [*args, "--spec", "net.json", "--quiet"])
    said = result.stderr.strip().splitlines()
    made = [path for path in Path().iterdir() if path.name.startswith(("c", ".c"))]
    assert "Traceback" not in result.stderr + result.stdout
    assert result.exit_code in (0, 2), (args, result.stderr)
    if result.exit_code == 2:
        assert len(said) == 1 and said[0].startswith("error: "), said
        assert not any(path.name[0] == "c" for path in made)
    for path in made:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert contents(good) == before
    assert not Path("pwned").exists()
    return result.exit_code == 2


COMMANDS = st.sampled_from(["align to it", "align it", "stream it", "merge it"])


# --- bytes ------------------------------------------------------------------------------------------------------------

FILES = st.sampled_from(["a.safetensors", "a.pt", "b/part0.safetensors", "b/part1.safetensors"])


@FUZZ
@given(
    name=FILES,
    command=COMMANDS,
    flips=st.lists(st.tuples(st.integers(0, 1 << 30), st.integers(0, 7)), max_size=4),
    cut=st.none() | st.integers(0, 1 << 30),
    more=st.binary(max_size=20),
)
def test_flipped_bits_cut_ends_and_more(
    good: Path, name: str, command: str, flips: list[tuple[int, int]], cut: int | None, more: bytes
) -> None:
    path = good / name
    original = path.read_bytes()
    content = bytearray(original)
    for place, bit in flips:
        content[place % len(content)] ^= 1 << bit
    if cut is not None:
        del content[cut % len(content) :]
    path.write_bytes(content + more)
    try:
        refused = refused_or_harmless(good, name.split("/")[0], command)
        damaged = cut is not None or bool(more)
        assert refused or not damaged or name == "a.pt", "cut or longer files must be refused"
    finally:
        path.write_bytes(original)


@FUZZ
@given(
    length=st.integers(0, 2**64 - 1) | st.integers(0, 400),
    header=st.binary(max_size=60)
    | st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=4),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["a", "dtype", "shape", "data_offsets", "__metadata__"]), inner, max_size=4
            )
        ),
        max_leaves=8,
    ).map(lambda value: json.dumps(value).encode()),
    command=COMMANDS,
)
def test_headers_of_any_kind(good: Path, length: int, header: bytes, command: str) -> None:
    path = good / "a.safetensors"
    original = path.read_bytes()
    try:
        for said in (length, len(header)):
            path.write_bytes(struct.pack("<Q", said) + header)
            assert refused_or_harmless(good, "a.safetensors", command)
    finally:
        path.write_bytes(original)


def test_a_name_that_stands_twice_in_the_header(good: Path) -> None:
    path = good / "a.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].rstrip()
    name = b'"head.bias":' + header.split(b'"head.bias":')[1].split(b"}")[0] + b"}"
    doubled = header[:-1] + b"," + name + b"}"
    path.write_bytes(struct.pack("<Q", len(doubled)) + doubled + content[8 + length :])
    assert refused_or_harmless(good, "a.safetensors", "align it")


# --- tensors and names ------------------------------------------------------------------------------------------------

CHANGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "NaN": lambda t: t.index_fill(0, torch.tensor([0]), float("nan")),
    "infinity": lambda t: t.index_fill(0, torch.tensor([0]), float("inf")),
    "minus infinity": lambda t: t.index_fill(0, torch.tensor([0]), float("-inf")),
    "one dimension more": lambda t: t[..., None],
    "one index more": lambda t: torch.cat([t, t[:1]]),
    "nothing": lambda t: t[:0],
    "a number": lambda t: t.sum(),
    "int32": lambda t: t.to(torch.int32),
    "bool": lambda t: t > 0,
    "uint16": lambda t: t.abs().to(torch.uint16),
    "complex": lambda t: t.to(torch.complex64),
}


@FUZZ
@given(which=st.integers(0, 5), change=st.sampled_from(sorted(CHANGES)), command=COMMANDS, pickled=st.booleans())
def test_wrong_values_shapes_and_dtypes(good: Path, which: int, change: str, command: str, pickled: bool) -> None:
    bad = "a.pt" if pickled else "a.safetensors"
    path = good / bad
    original = path.read_bytes()
    state = torch.load(path, weights_only=True) if pickled else load_file(path)
    name = sorted(state)[which % len(state)]
    state[name] = CHANGES[change](state[name]).contiguous()
    try:
        torch.save(state, path) if pickled else save_file(state, path)
        assert refused_or_harmless(good, bad, command)
    finally:
        path.write_bytes(original)


@FUZZ
@given(names=st.lists(st.text(max_size=8), min_size=1, max_size=3, unique=True), lose=st.booleans(), command=COMMANDS)
def test_names_that_nobody_knows(good: Path, names: list[str], lose: bool, command: str) -> None:
    path = good / "a.safetensors"
    original = path.read_bytes()
    state = load_file(path)
    if lose:
        state.pop(sorted(state)[0])
    for name in names:
        state[name or "_"] = torch.ones(2)
    try:
        save_file({name: tensor for name, tensor in state.items() if name != "__metadata__"}, path)
        assert refused_or_harmless(good, "a.safetensors", command)
    finally:
        path.write_bytes(original)


# --- indices ----------------------------------------------------------------------------------------------------------

PLACES = st.sampled_from(
    ["../a.safetensors", "..", ".", "", "/etc/passwd", "part9.safetensors", "b/part0.safetensors", "net.json"]
)


@FUZZ
@given(
    place=PLACES | st.text(max_size=6) | st.none() | st.integers() | st.lists(st.text(max_size=2), max_size=2),
    which=st.integers(0, 5),
    command=COMMANDS,
)
def test_indices_that_lead_astray(good: Path, place: object, which: int, command: str) -> None:
    path = good / "b" / "model.safetensors.index.json"
    original = path.read_text()
    listing = json.loads(original)
    names = sorted(listing["weight_map"])
    listing["weight_map"][names[which % len(names)]] = place
    try:
        path.write_text(json.dumps(listing))
        assert refused_or_harmless(good, "b", command)
    finally:
        path.write_text(original)


@FUZZ
@given(
    content=st.binary(max_size=30)
    | st.recursive(
        st.none() | st.integers() | st.text(max_size=3),
        lambda inner: (
            st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["weight_map", "x"]), inner, max_size=2)
        ),
        max_leaves=5,
    ).map(lambda value: json.dumps(value).encode())
)
def test_indices_of_any_kind(good: Path, content: bytes) -> None:
    path = good / "b" / "model.safetensors.index.json"
    original = path.read_bytes()
    try:
        path.write_bytes(content)
        assert refused_or_harmless(good, "b", "align it")
    finally:
        path.write_bytes(original)


# --- pickles ----------------------------------------------------------------------------------------------------------


class Evil:
    def __init__(self, call: Any, *args: Any) -> None:
        self.call, self.args = call, args

    def __reduce__(self) -> Any:
        return self.call, self.args


EVILS: dict[str, Any] = {
    "system": Evil(os.system, "touch pwned"),
    "exec": Evil(exec, "open('pwned', 'w')"),
    "eval": Evil(eval, "open('pwned', 'w')"),
    "open": Evil(open, "pwned", "w"),
    "getattr": Evil(getattr, "touch", "upper"),
    "nested": [{"x": Evil(os.mkdir, "pwned")}],
}


def zipped(pickled: bytes) -> bytes:
    """A pickle where torch.load looks for one."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
    return made.getvalue()


@pytest.mark.parametrize("command", ["align it", "merge it"])
@pytest.mark.parametrize("wrap", [bytes, zipped], ids=["bare", "zipped"])
@pytest.mark.parametrize("evil", sorted(EVILS))
def test_pickles_that_would_run_code(good: Path, evil: str, wrap: Callable[[bytes], bytes], command: str) -> None:
    for content in (EVILS[evil], {"state_dict": {"head.weight": torch.ones(3, 6), "x": EVILS[evil]}}):
        (good / "a.pt").write_bytes(wrap(pickle.dumps(content)))
        assert refused_or_harmless(good, "a.pt", command)


@FUZZ
@given(content=st.binary(max_size=40), wrap=st.sampled_from([bytes, zipped]))
def test_pickles_of_any_kind(good: Path, content: bytes, wrap: Callable[[bytes], bytes]) -> None:
    (good / "a.pt").write_bytes(wrap(b"\x80\x02" + content + b"."))
    assert refused_or_harmless(good, "a.pt", "align it")


@pytest.mark.parametrize(
    "content",
    [
        [],
        {},
        {"state_dict": {}},
        {"model": 3},
        {3: torch.ones(2)},
        {"head.weight": torch.ones(3, 6).to_sparse()},
        {"head.weight": "a text"},
        torch.ones(3),
    ],
    ids=lambda content: str(type(content)),
)
def test_pytorch_files_that_hold_something_else(good: Path, content: object) -> None:
    torch.save(content, good / "a.pt")
    assert refused_or_harmless(good, "a.pt", "align it")


# --- specs ------------------------------------------------------------------------------------------------------------


@FUZZ
@given(place=st.integers(0, 1 << 30), value=st.integers(0, 255), cut=st.booleans())
def test_damaged_specs(good: Path, place: int, value: int, cut: bool) -> None:
    path = good / "net.json"
    original = path.read_bytes()
    content = bytearray(original)
    content[place % len(content)] = value
    try:
        path.write_bytes(content[: place % len(content)] if cut else content)
        assert refused_or_harmless(good, "a.safetensors", "align it") or not cut
    finally:
        path.write_bytes(original)
