"""Some seventy small checkpoints as people have them, and what `align` and `merge` should make of each.

Most hold B, which is A with a hundredth of noise and its units in another order, in a layout that some script or
library writes; the others are damaged, hostile, or of something else. ``python tests/cli/untidy_files.py FOLDER`` makes
the files and prints their table, which is that of docs/untidy.md; it is the same each time.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save, save_file

from tests.cli.untidy_networks import NETS, SHAPES, TIED_SHAPES, Case, State, draw, near, reordered

CASES: dict[str, Case] = {}


def case(name: str, **about: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add a case, which the function below makes, given the folder and B's state dict."""

    def add(make: Callable[..., None]) -> Callable[..., None]:
        shapes = TIED_SHAPES if about.get("tied") else SHAPES

        def made(folder: Path) -> None:
            make(folder, reordered(near(draw(0, shapes))))

        CASES[name] = Case(name, made, **about)
        return make

    return add


def saves(name: str, change: Callable[[State], Any], **about: Any) -> None:
    """Add a case that is a PyTorch file with something made of B's state dict."""

    def make(folder: Path, state: State) -> None:
        torch.save(change(state), folder / about.get("b", "b.pt"))

    case(name, **about)(make)


def prefixed(prefix: str) -> Callable[[State], State]:
    """The state dict with something before each key."""
    return lambda state: {prefix + name: tensor for name, tensor in state.items()}


def cast(dtype: torch.dtype) -> Callable[[State], State]:
    """The state dict in another type."""
    return lambda state: {name: tensor.to(dtype) for name, tensor in state.items()}


# --- what stands before the keys --------------------------------------------------------------------------------------

saves("as it is", lambda s: s)
saves("`module.` of DataParallel", prefixed("module."), key="module.{}".format)
saves("`model.` of a wrapper", prefixed("model."), key="model.{}".format)
saves("`_orig_mod.` of torch.compile", prefixed("_orig_mod."), key="_orig_mod.{}".format)
saves("`_orig_mod.module.` of both", prefixed("_orig_mod.module."), key="_orig_mod.module.{}".format)
saves(
    "`_checkpoint_wrapped_module.` within the names",
    lambda s: {name.replace(".", "._checkpoint_wrapped_module.", 1): t for name, t in s.items()},
    key=lambda name: name.replace(".", "._checkpoint_wrapped_module.", 1),
)
saves(
    "`_fsdp_wrapped_module.` within the names",
    lambda s: {f"_fsdp_wrapped_module.{name.replace('.', '._fsdp_wrapped_module.', 1)}": t for name, t in s.items()},
    key=lambda name: f"_fsdp_wrapped_module.{name.replace('.', '._fsdp_wrapped_module.', 1)}",
)
saves("an average of SWA, with `n_averaged`", lambda s: {"n_averaged": torch.tensor(7), **prefixed("module.")(s)},
      key="module.{}".format)  # fmt: skip
saves(
    "the weights twice, under two prefixes",
    lambda s: {**s, **prefixed("module.")(s)},
    refused="10 keys that the model does not know",
)

# --- what stands around them ------------------------------------------------------------------------------------------

saves("`state_dict` in a `.pth.tar`", lambda s: {"state_dict": s, "epoch": 3, "arch": "net"}, b="b.pth.tar",
      where=("state_dict",))  # fmt: skip
saves("`params` beside `params_ema`", lambda s: {"params": s, "params_ema": near(s)}, where=("params",),
      said="'params_ema' not carried over")  # fmt: skip
saves("`params_ema` alone", lambda s: {"params_ema": s}, where=("params_ema",))
saves("`generator` beside `discriminator`", lambda s: {"generator": s, "discriminator": near(s)},
      refused="state dicts under 'generator', 'discriminator': say which one")  # fmt: skip
saves("the same with `--entry generator`", lambda s: {"generator": s, "discriminator": near(s)}, where=("generator",),
      options=("--entry", "generator"), said="'discriminator' not carried over")  # fmt: skip


def trained(state: State) -> dict[str, Any]:
    """The state of Adam for each parameter."""
    moments = {n: {"step": torch.tensor(4.0), "exp_avg": t, "exp_avg_sq": t**2} for n, t in enumerate(state.values())}
    return {"state": moments, "param_groups": [{"lr": 1e-3, "params": list(moments)}]}


saves("a training script's, with its optimizer", lambda s: {"model": s, "optimizer": trained(s), "epoch": 9},
      where=("model",), said="'optimizer' not carried over")  # fmt: skip
saves(
    "Lightning's",
    lambda s: {
        "epoch": 2, "global_step": 40, "pytorch-lightning_version": "2.4.0", "state_dict": prefixed("net.")(s),
        "loops": {"fit_loop": {"state_dict": {}}}, "callbacks": {}, "optimizer_states": [trained(s)],
        "lr_schedulers": [], "hyper_parameters": {"width": 12},
    },
    b="b.ckpt", where=("state_dict",), key="net.{}".format, said="'optimizer_states' not carried over",
)  # fmt: skip
saves(
    "Lightning's with a loss that has weights",
    lambda s: {"state_dict": {**prefixed("net.")(s), "loss.weight": torch.ones(3)}},
    b="b.ckpt", refused="1 key that the model does not know: 'loss.weight'",
)  # fmt: skip
saves(
    "the same with `--leave`",
    lambda s: {"state_dict": {**prefixed("net.")(s), "loss.weight": torch.ones(3)}},
    b="b.ckpt", where=("state_dict",), key="net.{}".format, options=("--leave", "loss.*"),
)  # fmt: skip
saves("averages under `ema.`", lambda s: {**s, **prefixed("ema.")(s)}, refused="--leave 'ema.first.weight'")
saves("the same with `--leave`", lambda s: {**s, **prefixed("ema.")(s)}, options=("--leave", "ema.*"),
      said="no longer go with them")  # fmt: skip
saves("a Namespace of arguments beside", lambda s: {"model": s, "args": argparse.Namespace(lr=0.1)}, where=("model",))
saves("numbers of NumPy beside", lambda s: {"model": s, "best": np.float64(0.5)}, where=("model",))
saves("parameters, no buffers", lambda s: {n: torch.nn.Parameter(t) for n, t in s.items() if "running" not in n},
      refused="the state dict has no 'norm.running_mean'")  # fmt: skip
saves("in an OrderedDict of Parameters", lambda s: OrderedDict((n, torch.nn.Parameter(t)) for n, t in s.items()))

# --- keys too many, too few -------------------------------------------------------------------------------------------

saves("buffers that the library leaves unread", lambda s: {**s, "scale": torch.ones(6), "first.mask": torch.ones(12)},
      said="2 keys that the model leaves unread")  # fmt: skip
saves("keys that it does not know", lambda s: {**s, "extra.0.weight": torch.ones(2), "extra.1.weight": torch.ones(2)},
      refused="2 keys that the model does not know: 'extra.0.weight'")  # fmt: skip
saves("a missing key", lambda s: {name: t for name, t in s.items() if name != "second.bias"},
      refused="the state dict has no 'second.bias'")  # fmt: skip
saves("a weight of another shape", lambda s: {**s, "second.weight": s["second.weight"][:, :11].clone()},
      refused=r"'second.weight' has shape \(12, 11\), but the spec says \(12, 12\)")  # fmt: skip
saves(
    "weight norm, in two parts",
    lambda s: {**{n: t for n, t in s.items() if n != "second.weight"}, "second.weight_g": torch.ones(12, 1),
               "second.weight_v": s["second.weight"]},
    refused="2 keys that the model does not know: 'second.weight_g', 'second.weight_v'",
)  # fmt: skip
saves("tied, under one name", lambda s: s, model="net.py:Tied", tied=True)
saves("tied, under both", lambda s: {**s, "head.weight": s["table.weight"]}, model="net.py:Tied", tied=True)
saves("tied, saved as two equal tensors", lambda s: {**s, "head.weight": s["table.weight"].clone()},
      model="net.py:Tied", tied=True)  # fmt: skip
saves("tied, but two different tensors", lambda s: {**s, "head.weight": s["table.weight"] + 1}, model="net.py:Tied",
      tied=True, refused=(None, "ties 'head.weight' to 'table.weight', and b.pt has another"))  # fmt: skip

# --- types ------------------------------------------------------------------------------------------------------------

saves("float16", cast(torch.float16), dtype=torch.float16)
saves("bfloat16", cast(torch.bfloat16), dtype=torch.bfloat16)
saves("float64", cast(torch.float64), dtype=torch.float64)
saves("float8", cast(torch.float8_e4m3fn), dtype=torch.float8_e4m3fn)
saves("float16, the norm in float32", lambda s: {n: t if "norm" in n else t.half() for n, t in s.items()},
      dtype=torch.float16)  # fmt: skip
saves("int8", cast(torch.int8), refused="is torch.int8, but the model's weights are floating point: dequantise first")
saves(
    "float8 with a scale for each weight",
    lambda s: {**cast(torch.float8_e4m3fn)({n: t * 4 for n, t in s.items()}),
               **{f"{n}_scale": torch.tensor(0.25) for n in s if n.endswith("weight")}},
    refused="'first.weight' is torch.float8_e4m3fn, and 'first.weight_scale'",
)  # fmt: skip
saves("torch's quantised tensors",
      lambda s: {n: torch.quantize_per_tensor(t, 0.05, 0, torch.qint8) for n, t in s.items()},
      refused="'first.weight' is quantised: only ordinary dense tensors are read")  # fmt: skip
saves("a sparse tensor", lambda s: {**s, "second.weight": s["second.weight"].to_sparse()},
      refused="'second.weight' is torch.sparse_coo: only ordinary dense tensors are read")  # fmt: skip
saves("complex in B alone", cast(torch.complex64), refused="is torch.float32 in a.safetensors but torch.complex64 in b")
saves("tensors without values, of `meta`", lambda s: {n: t.to("meta") for n, t in s.items()},
      refused="'first.weight' has no values")  # fmt: skip


@case("A in float16, B in float32", a="half.pt")
def _(folder: Path, state: State) -> None:
    torch.save(cast(torch.float16)(draw(0)), folder / "half.pt")
    torch.save(state, folder / "b.pt")


# --- how tensors lie in the file --------------------------------------------------------------------------------------

saves("transposed views", lambda s: {n: t.t().contiguous().t() if t.ndim == 2 else t for n, t in s.items()})


@case("views of one flat buffer")
def _(folder: Path, state: State) -> None:
    flat = torch.cat([tensor.flatten() for tensor in state.values()])
    parts = torch.split(flat, [tensor.numel() for tensor in state.values()])
    torch.save({n: part.view(state[n].shape) for n, part in zip(state, parts, strict=True)}, folder / "b.pt")


@case("PyTorch's old format")
def _(folder: Path, state: State) -> None:
    torch.save(state, folder / "b.pt", _use_new_zipfile_serialization=False)


@case("shards with an index", b="b")
def _(folder: Path, state: State) -> None:
    shards(folder / "b", state, lambda part, path: save_file(part, path), "model-{}.safetensors")


@case("shards of `.bin` with an index", b="b")
def _(folder: Path, state: State) -> None:
    shards(folder / "b", state, torch.save, "pytorch_model-{}.bin")


@case(
    "`.bin` with other weights beside `.safetensors`", b="b", said="model.safetensors was read, not pytorch_model.bin"
)
def _(folder: Path, state: State) -> None:
    (folder / "b").mkdir()
    save_file(state, folder / "b" / "model.safetensors")
    torch.save(draw(5), folder / "b" / "pytorch_model.bin")


@case("a Trainer's folder", b="b", said="optimizer.pt, training_args.bin not carried over")
def _(folder: Path, state: State) -> None:
    (folder / "b").mkdir()
    save_file(state, folder / "b" / "model.safetensors")
    torch.save(trained(state), folder / "b" / "optimizer.pt")
    torch.save({"lr": 0.1}, folder / "b" / "training_args.bin")


@case("an index without one of its shards", b="b", refused="'model-2.safetensors', which is not there")
def _(folder: Path, state: State) -> None:
    shards(folder / "b", state, lambda part, path: save_file(part, path), "model-{}.safetensors")
    (folder / "b" / "model-2.safetensors").unlink()


@case("an index that leads out of its folder", b="b", refused="'../a.safetensors', and may name only files in its")
def _(folder: Path, state: State) -> None:
    shards(folder / "b", state, lambda part, path: save_file(part, path), "model-{}.safetensors")
    index = folder / "b" / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-2.safetensors", "../a.safetensors"))


def shards(folder: Path, state: State, write: Callable[[State, Path], object], names: str) -> None:
    """Write a state dict in two files and an index."""
    folder.mkdir()
    half, keys = len(state) // 2, list(state)
    placed: dict[str, str] = {}
    for number, part in enumerate((keys[:half], keys[half:]), 1):
        write({name: state[name] for name in part}, folder / names.format(number))
        placed.update(dict.fromkeys(part, names.format(number)))
    start, ending = names.split("-")[0], names.rpartition(".")[2]
    (folder / f"{start}.{ending}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))


# --- damaged, hostile, something else ---------------------------------------------------------------------------------


class Trap:
    """Makes a file where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("trapped",)


saves("a pickle with code in it", lambda s: {"model": s, "more": Trap()}, refused="refused: it holds more than tensors")
saves("a whole pickled module", lambda s: torch.nn.Linear(2, 2), refused="refused: it holds more than tensors")
saves(
    "NaN in B", lambda s: {**s, "second.bias": s["second.bias"] / 0 * 0}, refused="'second.bias' holds NaN or infinity"
)
saves("infinity in the head", lambda s: {**s, "head.bias": s["head.bias"] / 0}, refused="'head.bias' holds NaN or inf")
saves("no weights", lambda s: {}, refused="no state dict in it, but an empty mapping")
saves("a single tensor", lambda s: s["first.weight"], refused="no state dict in it, but a Tensor")
saves("an optimizer alone", lambda s: {"optimizer": trained(s)}, refused="no state dict in it, but a mapping with the")
saves("of another network", lambda s: {"trunk.weight": torch.ones(12, 6)}, refused="is it of another architecture")


def writes(name: str, content: Callable[[State], bytes], **about: Any) -> None:
    """Add a case that is a file of these bytes."""

    def make(folder: Path, state: State) -> None:
        (folder / about.get("b", "b.pt")).write_bytes(content(state))

    case(name, **about)(make)


def saved(content: Any) -> bytes:
    """The bytes of a PyTorch file."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def zipped(name: str, content: bytes) -> bytes:
    """The bytes of a ZIP archive with one file."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, content)
    return buffer.getvalue()


def tarred(name: str, content: bytes) -> bytes:
    """The bytes of a compressed TAR archive with one file."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        about = tarfile.TarInfo(name)
        about.size = len(content)
        archive.addfile(about, io.BytesIO(content))
    return buffer.getvalue()


def scripted(_: State) -> bytes:
    """The bytes of a network compiled by TorchScript."""
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), buffer)
    return buffer.getvalue()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 44512\n"
SAFE = "b.safetensors"
writes("cut off, safetensors", lambda s: save(s)[:-40], b=SAFE, refused="it is truncated")
writes("cut off, PyTorch", lambda s: saved(s)[:-400], refused="not a PyTorch file, or a damaged one")
writes("an empty file", lambda s: b"", refused="b.pt: it is empty")
writes("an empty file, safetensors", lambda s: b"", b=SAFE, refused="b.safetensors: it is empty")
writes("a pointer of Git LFS", lambda s: POINTER, refused="a pointer of Git LFS.*git lfs pull")
writes("the same, safetensors", lambda s: POINTER, b=SAFE, refused="a pointer of Git LFS.*git lfs pull")
writes("a web page", lambda s: b"<!DOCTYPE html><html>404</html>", b=SAFE, refused="b.safetensors: it is a web page")
writes("safetensors under the name of PyTorch", save, b="b.bin", refused="rename it to end in .safetensors")
writes("PyTorch under the name of safetensors", saved, b=SAFE, refused="PyTorch file.*rename it")
writes("a checkpoint inside a ZIP archive", lambda s: zipped("b.pt", saved(s)), refused="an archive.*unpack it")
writes("a checkpoint inside a TAR archive", lambda s: tarred("b.pt", saved(s)), b="b.tar", refused="an archive.*unpack")
writes("TorchScript", scripted, refused="TorchScript")
writes("a GGUF file", lambda s: b"GGUF" + bytes(60), b="b.gguf", refused="GGUF is not read")
writes("NumPy's `.npz`", lambda s: b"PK", b="b.npz", refused="a checkpoint is a folder, or ends in")
case("a path that is not there", refused="b.pt: no such file or folder")(lambda folder, state: None)


@case("an adapter's folder", b="b", refused="it holds an adapter, not a model")
def _(folder: Path, state: State) -> None:
    (folder / "b").mkdir()
    (folder / "b" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2}))
    save_file({"base_model.model.first.lora_A.weight": torch.ones(2, 6)}, folder / "b" / "adapter_model.safetensors")


@case("a folder with two files and no index", b="b", refused="several weight files and no index")
def _(folder: Path, state: State) -> None:
    (folder / "b").mkdir()
    for name in ("first.pt", "second.pt"):
        torch.save(state, folder / "b" / name)


def prepare(folder: Path, each: Case) -> None:
    """Write a case's files, and the code of its network, into an empty folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "net.py").write_text(NETS)
    save_file(draw(0, TIED_SHAPES if each.tied else SHAPES), folder / "a.safetensors")
    each.make(folder)


def table() -> Iterator[str]:
    """The lines of the table in docs/untidy.md."""
    yield "| B is | align | merge |"
    yield "| --- | --- | --- |"
    for each in CASES.values():
        done = ["right" if said is None else "refused" for said in each.refusals]
        yield f"| {each.name} | {done[0]} | {done[1]} |"


if __name__ == "__main__":
    root = Path(sys.argv[1])
    for number, one in enumerate(CASES.values()):
        prepare(root / f"{number:02d}", one)
    print("\n".join(table()))
