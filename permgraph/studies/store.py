"""Where the results of a study are kept: a folder, or any URL that fsspec knows, shared by every worker.

    models/<fingerprint>.safetensors      the networks, one file each however many cells use them
    cells/<key>.json                      what one cell gave
    permutations/<key>.safetensors        the permutation, or transformation, that it found
    begun/<key>                           a cell that some worker is at, or was at when it died

A result's name follows from its content's inputs, so that two workers which write the same one write the same bytes,
and nothing has to be locked.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch
import torch

from permgraph.errors import StudyError, in_one_line
from permgraph.studies.extras import imported

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

KEY = re.compile(r"[0-9a-f]{8,64}")
LOCAL = ("file", "local")
SMALLEST = 4096  # bytes that a file takes on most disks, however short it is


class UnwritableError(StudyError):
    """The store takes nothing more, which ends a study rather than one of its cells."""


@dataclass(frozen=True)
class Store:
    """A place for results.

    Args:
        url: a folder, or a URL such as ``s3://bucket/study``; `~` is expanded.
    """

    url: str

    @cached_property
    def _place(self) -> tuple[AbstractFileSystem, str]:
        fsspec = imported("fsspec")
        try:
            filesystem, path = fsspec.core.url_to_fs(os.path.expanduser(self.url))
        except (ValueError, ImportError) as error:
            raise StudyError(f"the store {self.url!r} cannot be opened: {error}") from error
        return filesystem, path.rstrip("/")

    def require_access(self) -> None:
        """Write, read and remove a small file, so that a store that does not take one is met before the work.

        Raises:
            MissingExtraError: fsspec is not installed.
            StudyError: the store cannot be opened, or one of the three failed.
        """
        name, content = f"begun/{uuid.uuid4().hex}", os.urandom(SMALLEST)
        _ = self._place
        try:
            self._write(name, content)
            returned = self._read(name)
            self._remove(name)
        except UnwritableError:
            raise
        except Exception as error:  # as in `_write`
            raise StudyError(f"the store {self.url!r} cannot be written to: {in_one_line(error)}") from error
        if returned != content:
            raise StudyError(f"the store {self.url!r} gave back other bytes than were written")

    def require_room(self, needed: int) -> None:
        """Compare what is going to be written with what is free, where the store is a folder.

        Args:
            needed: bytes.

        Raises:
            StudyError: there is not that much room.
        """
        filesystem, root = self._place
        protocol = filesystem.protocol if isinstance(filesystem.protocol, str) else filesystem.protocol[0]
        if protocol in LOCAL and (free := shutil.disk_usage(root).free) < needed:
            raise StudyError(
                f"the store {self.url!r} has {free / 1e6:,.1f} MB of room, and the study writes about "
                f"{needed / 1e6:,.1f} MB: make room, or choose another place"
            )

    # -- cells --------------------------------------------------------------------------------------------------------

    def record(self, key: str) -> dict[str, Any] | None:
        """What a cell gave, or None where nothing whole is there."""
        content = self._read(f"cells/{_checked(key)}.json")
        if content is None:
            return None
        try:
            found = json.loads(content)
        except ValueError:
            return None
        return found if isinstance(found, dict) and found.get("key") == key else None

    def put_record(self, key: str, record: Mapping[str, Any]) -> None:
        """Keep what a cell gave; the last thing to be written of a cell."""
        content = json.dumps({"key": key, **record}, indent=1, sort_keys=True, allow_nan=True)
        self._write(f"cells/{_checked(key)}.json", content.encode())
        self._remove(f"begun/{key}")

    def forget(self, key: str) -> None:
        """Drop a cell's record, so that it runs again."""
        self._remove(f"cells/{_checked(key)}.json")

    def begin(self, key: str) -> None:
        """Note that a worker is at this cell."""
        self._write(f"begun/{_checked(key)}", b"")

    def begun(self, keys: Iterable[str]) -> set[str]:
        """Those of the cells that a worker is at, or was at when it died."""
        return self._names("begun") & set(keys)

    def recorded(self, keys: Iterable[str]) -> set[str]:
        """Those of the cells that have a record, by one look at their folder and without reading any."""
        return {name.removesuffix(".json") for name in self._names("cells")} & set(keys)

    def _names(self, folder: str) -> set[str]:
        filesystem, root = self._place
        filesystem.invalidate_cache()
        try:
            return {path.rsplit("/", 1)[-1] for path in filesystem.ls(f"{root}/{folder}", detail=False)}
        except (FileNotFoundError, NotADirectoryError):
            return set()
        except Exception as error:  # as in `_write`
            raise StudyError(f"the store {self.url!r} cannot be read: {in_one_line(error)}") from error

    # -- tensors ------------------------------------------------------------------------------------------------------

    def put_tensors(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep tensors under ``models/…`` or ``permutations/…``; what is there already stays."""
        path = f"{name}.safetensors"
        if not self.holds(path):
            apart = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
            self._write(path, safetensors.torch.save(apart))

    def holds(self, path: str) -> bool:
        """Whether there is a file of that name."""
        filesystem, root = self._place
        return bool(filesystem.exists(f"{root}/{path}"))

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """Read tensors back.

        Raises:
            StudyError: they are not there, or damaged.
        """
        content = self._read(f"{name}.safetensors")
        if content is None:
            raise StudyError(f"the store {self.url!r} has no {name!r}: was it emptied while the study ran?")
        try:
            return safetensors.torch.load(content)
        except safetensors.SafetensorError as error:
            raise StudyError(f"{name!r} in the store {self.url!r} is damaged: {error}") from error

    # -- bytes --------------------------------------------------------------------------------------------------------

    def _write(self, name: str, content: bytes) -> None:
        """Whole or not at all: object stores put a file in one step, elsewhere it is renamed into its place.

        Raises UnwritableError if the store does not take it.
        """
        filesystem, root = self._place
        target = f"{root}/{name}"
        beside = f"{target}.{uuid.uuid4().hex}.tmp"
        try:
            filesystem.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
            filesystem.pipe_file(beside, content)
            filesystem.mv(beside, target)
        except BaseException as error:
            with contextlib.suppress(Exception):
                if filesystem.exists(beside):
                    filesystem.rm_file(beside)
            if not isinstance(error, Exception):
                raise
            # What a remote store raises is its own affair.
            raise UnwritableError(
                f"the store {self.url!r} cannot be written to: {in_one_line(error)}; what was done is kept, and the "
                "same call goes on from there"
            ) from error

    def _read(self, name: str) -> bytes | None:
        filesystem, root = self._place
        try:
            content = filesystem.cat_file(f"{root}/{name}")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except Exception as error:  # as in `_write`
            raise StudyError(f"the store {self.url!r} cannot be read: {in_one_line(error)}") from error
        assert isinstance(content, bytes)
        return content

    def _remove(self, name: str) -> None:
        filesystem, root = self._place
        if filesystem.exists(f"{root}/{name}"):
            filesystem.rm_file(f"{root}/{name}")

    def __reduce__(self) -> tuple[Any, ...]:
        return Store, (self.url,)


def _checked(key: str) -> str:
    if not KEY.fullmatch(key):
        raise StudyError(f"{key!r} is not the key of a cell")
    return key
