"""What a run keeps with its staging, so that the same command goes on where it was interrupted."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import IO, Any

from permgraph.io import Staging
from permgraph.matching.streamed import StreamedWeightMatching
from permgraph.spec.elements import AnyElement
from permgraph.spec.permutation import Permutation
from permgraph.spec.spec import PermutationSpec
from permgraph.spec.transformation import Transformation


def resumed(
    matcher: StreamedWeightMatching, staging: Staging, prefix: str, spec: PermutationSpec
) -> StreamedWeightMatching:
    """The matcher, beginning after the last sweep that an earlier run has kept, and keeping its own."""
    prefix = f"{prefix}sweep-"

    def keep(sweep: int, element: AnyElement) -> None:
        save(staging, f"{prefix}{sweep}.safetensors", element)

    done = max((int(n.removeprefix(prefix).split(".")[0]) for n in staging.finished if n.startswith(prefix)), default=0)
    if not done:
        return dataclasses.replace(matcher, keep=keep)
    reached = load_element(staging.path(f"{prefix}{done}.safetensors"), spec)
    return dataclasses.replace(matcher, init=reached, done=done, keep=keep)


def load_element(path: Path, spec: PermutationSpec) -> AnyElement:
    """Read what `save` kept."""
    return Permutation.load(path, spec) if spec.general is None else Transformation.load(path, spec)


def save(staging: Staging, name: str, permutation: AnyElement) -> None:
    """Keep a permutation, or a transformation, with the staging."""
    permutation.save(staging.path(name))
    content = staging.path(name).read_bytes()
    staging.make(name, lambda file: _write(file, content))


def keep_json(staging: Staging, name: str, value: Any) -> None:
    """Keep plain data with the staging."""
    staging.make(name, lambda file: _write(file, json.dumps(value).encode()))


def _write(file: IO[bytes], content: bytes) -> None:
    file.write(content)
