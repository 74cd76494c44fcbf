"""permgraph beside `torch-pruning` and `rebasin`, in one run: what each finds in the same models, and whether it holds.

    pip install --no-deps torch-pruning rebasin torchview graphviz
    python -m benchmarks.zoo compare

The three are made for different things. torch-pruning finds channels that must be *removed* together, for which they
need not be interchangeable; rebasin aligns two networks, for which it needs what is here asked of it. Each one's groups
are put to the same test: on random weights in float64 the channels of a group are renumbered, and the outputs must
stay. rebasin is judged with BatchNorm's running statistics at zero and one, since it leaves them to be computed again.
The models' own inputs are given to all, since only permgraph finds them by itself.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import math
import multiprocessing
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import permgraph as pg
from benchmarks.zoo.names import ZOOS
from benchmarks.zoo.sweep import RESULTS, warm_up
from permgraph.capture import capture
from permgraph.capture.python_state import python_state_restored
from permgraph.inference.auto_spec import spec_of

MODELS = {
    "torchvision": (
        "resnet18", "squeezenet1_1", "mobilenet_v2", "shufflenet_v2_x0_5", "densenet121", "googlenet", "vgg11_bn",
        "resnext50_32x4d", "efficientnet_b0", "regnet_y_400mf", "convnext_tiny", "swin_t", "vit_b_32",
    ),
    "timm": ("test_resnet", "test_vit", "test_convnext", "ghostnet_050", "mixer_s32_224", "levit_128s"),
}  # fmt: skip
TOLERANCE = 1e-9
SECONDS = 300.0


def build(zoo: str, name: str, seed: int) -> nn.Module:
    """A model in float64 whose every parameter and buffer is random, so that no symmetry is an accident."""
    generator = torch.Generator().manual_seed(seed)
    model = next(iter(ZOOS[zoo].build(name))).eval().double()
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if not tensor.is_floating_point():
                continue
            normal = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            if tensor.ndim > 1:
                tensor.copy_(normal * 0.7 * 1.5 / math.sqrt(max(1, tensor[0].numel())))
            elif key.endswith(("bias", "mean")):
                tensor.copy_(0.2 * normal)
            else:
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator, dtype=torch.float64))
    return model


def outputs(model: nn.Module, inputs: tuple[Any, ...]) -> Any:
    """What a model returns; what forward keeps on its modules is not there the next time."""
    with python_state_restored(model.modules()):
        return model(*inputs)


def distance(a: Any, b: Any) -> float:
    """The largest difference relative to the largest magnitude; of several outputs the first counts."""
    first, second = (x if isinstance(x, Tensor) else next(iter(x)) for x in (a, b))
    return float((first - second).abs().max() / first.abs().max())


# -- the three: each returns its channels, how many groups it has, how many of them hold, and its seconds -------------


def with_permgraph(zoo: str, name: str, inputs: tuple[Any, ...]) -> dict[str, Any]:
    model = build(zoo, name, 0)
    started = time.process_time()
    spec = pg.auto_spec(model, inputs)
    seconds = time.process_time() - started
    with torch.no_grad():
        before = outputs(model, inputs)
        model.load_state_dict(spec.random(0, every_group=True).apply(model.state_dict()))
        whole = distance(before, outputs(model, inputs)) <= TOLERANCE
    sizes = [group.size for group in spec.moving.values()]
    return {"channels": sum(sizes), "groups": len(sizes), "hold": len(sizes) if whole else 0, "seconds": seconds}


def with_torch_pruning(zoo: str, name: str, inputs: tuple[Any, ...]) -> dict[str, Any]:
    import torch_pruning

    model = build(zoo, name, 0)
    started = time.process_time()
    graph = torch_pruning.DependencyGraph().build_dependency(model, example_inputs=inputs)
    groups = list(graph.get_all_groups())
    seconds = time.process_time() - started
    with torch.no_grad():
        before = outputs(model, inputs)
    channels = held = count = 0
    for group in groups:
        if any(item.dep.target.module is _last(model) and _is_out(graph, item) for item in group):
            continue  # the classes: a user of the tool leaves them out by hand
        count += 1
        size = len(group[0].idxs)
        with _renumbered(model, graph, group, size) as done:
            if done:
                with torch.no_grad():
                    holds = distance(before, outputs(model, inputs)) <= TOLERANCE
                held += holds
                channels += size * holds
    return {"channels": channels, "groups": count, "hold": held, "seconds": seconds}


def _last(model: nn.Module) -> nn.Module:
    return [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))][-1]


def _is_out(graph: Any, item: Any) -> bool:
    return bool(graph.is_out_channel_pruning_fn(item.dep.handler))


@contextlib.contextmanager
def _renumbered(model: nn.Module, graph: Any, group: Any, size: int) -> Iterator[bool]:
    """Renumber the channels of a group in every tensor that it names, for a while; false if it names what has none."""
    order = torch.randperm(size, generator=torch.Generator().manual_seed(0)).tolist()
    saved = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    try:
        with torch.no_grad():
            for item in group:
                for tensor, dim in _tensors(item.dep.target.module, _is_out(graph, item)):
                    places: dict[int, list[int]] = defaultdict(list)
                    for index, root in zip(item.idxs, item.root_idxs or item.idxs, strict=True):
                        places[root].append(index)
                    rows = torch.arange(tensor.shape[dim])
                    for root, wanted in enumerate(order):
                        rows[places[root]] = torch.tensor(places[wanted])
                    tensor.copy_(tensor.index_select(dim, rows))
        yield True
    except (IndexError, KeyError, RuntimeError, ValueError, TypeError):
        yield False
    finally:
        model.load_state_dict(saved)


def _tensors(module: nn.Module, out: bool) -> list[tuple[Tensor, int]]:
    """The tensors of a module along which its channels run, and the dimension."""
    if not list(module.parameters(recurse=False)):
        return []
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        depthwise = isinstance(module, nn.Conv2d) and module.groups == module.in_channels == module.out_channels > 1
        if not (out or depthwise):
            return [(module.weight, 1)]
        return [(t, 0) for t in (module.weight, module.bias) if t is not None]
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return [(t, 0) for t in (module.weight, module.bias, module.running_mean, module.running_var) if t is not None]
    if isinstance(module, (nn.LayerNorm, nn.GroupNorm)):
        return [(t, 0) for t in (module.weight, module.bias) if t is not None]
    raise TypeError(type(module).__name__)


def with_rebasin(zoo: str, name: str, inputs: tuple[Any, ...]) -> dict[str, Any]:
    import rebasin

    target, model = build(zoo, name, 1), build(zoo, name, 0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.zero_()  # it leaves running statistics as they are, to be computed again by its user
            module.running_var.fill_(1)
    with torch.no_grad():
        before = outputs(model, inputs)
    started = time.process_time()
    descent = rebasin.PermutationCoordinateDescent(target, model, inputs[0])
    seconds = time.process_time() - started
    descent.rebasin(max_iterations=1)
    with torch.no_grad():
        holds = distance(before, outputs(model, inputs)) <= TOLERANCE
    found: dict[int, int] = {}
    for module in _leaves(descent.pinit.model_graph):
        permutations = getattr(module, "axis_to_permutation", None) or {0: getattr(module, "_permutation", None)}
        for permutation in permutations.values():
            if permutation is not None and not bool((permutation.perm_indices.diff() == 1).all()):
                found[id(permutation)] = len(permutation)
    hold = len(found) if holds else 0
    return {
        "channels": sum(found.values()) if holds else 0, "groups": len(found), "hold": hold, "seconds": seconds,
    }  # fmt: skip


def _leaves(path: Any) -> Iterator[Any]:
    """The modules in nested paths."""
    if hasattr(path, "apply_permutations") and not hasattr(path, "__iter__"):
        yield path
        return
    for inner in path:
        yield from _leaves(inner)


TOOLS: dict[str, Callable[[str, str, tuple[Any, ...]], dict[str, Any]]] = {
    "permgraph": with_permgraph,
    "torch-pruning": with_torch_pruning,
    "rebasin": with_rebasin,
}


# -- the run ----------------------------------------------------------------------------------------------------------


def sweep(results: Path = RESULTS) -> None:
    """Measure every model with every tool, each in a process of its own, and record it."""
    warm_up()
    results.mkdir(parents=True, exist_ok=True)
    path = results / "compare.jsonl"
    done = {(r["name"], r["tool"]) for r in records(path)}
    for zoo, names in MODELS.items():
        for name in names:
            for tool in TOOLS:
                if (name, tool) not in done:
                    record = {"zoo": zoo, "name": name, "tool": tool, "version": version(tool)} | _measured(
                        zoo, name, tool
                    )
                    with path.open("a") as file:
                        file.write(json.dumps(record) + "\n")
                    print(record, flush=True)


def records(path: Path) -> list[dict[str, Any]]:
    """What was recorded; nothing if there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def version(tool: str) -> str:
    try:
        return importlib.metadata.version(tool)
    except importlib.metadata.PackageNotFoundError:
        return pg.__version__ if tool == "permgraph" else ""


def _measured(zoo: str, name: str, tool: str) -> dict[str, Any]:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    worker = context.Process(target=_work, args=(sender, zoo, name, tool), daemon=True)
    worker.start()
    sender.close()
    found: dict[str, Any] = {"error": f"stopped after {SECONDS:.0f} s"}
    with contextlib.suppress(EOFError):
        if receiver.poll(SECONDS):
            found = receiver.recv()
    worker.kill()
    worker.join()
    return found


def _work(sender: Connection, zoo: str, name: str, tool: str) -> None:
    try:
        captured = capture(build(zoo, name, 0).float())
        inputs = tuple(
            t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in captured.inputs.args
        )
        spec_of(captured)  # so that what is imported or cached on first use is charged to nobody
        sender.send(TOOLS[tool](zoo, name, inputs))
    except BaseException as error:
        sender.send({"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"})
