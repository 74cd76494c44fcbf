"""A place beside the output where it is made, so that it appears whole or not at all, and an interrupted run goes on.

Beside ``out`` that is the folder ``.out.permgraph``. Its journal names the job, and each file that is finished with its
SHA-256; a run of the same job keeps those files, after it has compared them, and a run of another job starts afresh.
The last act is a rename. Where that replaces a folder, the old one is moved aside first, and put back by the next run
if none came to take its place.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from permgraph.errors import CheckpointError, MismatchError, NonFiniteError
from permgraph.io.distributed_folder import METADATA
from permgraph.io.files import write_atomically

JOURNAL = "journal.json"
RESULT = "out"
REPLACED = "replaced"
LOCK = ".lock"


class Staging:
    """Writes one output file or folder whole or not at all, and goes on after an interruption.

    Args:
        target: the output.
        job: what the output is made from and how, as plain data: two runs with the same job make the same bytes.
        overwrite: whether a target that exists may be replaced.

    Raises:
        CheckpointError: the target exists and may not be replaced, another run is at work on it, or the staging folder
            holds something that no run put there.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     target = Path(folder, "result.txt")
        ...     with Staging(target, {"task": "greet"}) as staging:
        ...         staging.make("result.txt", lambda file: file.write(b"hello") and None)
        ...         target.exists()
        ...         staging.finish("result.txt")
        ...     target.read_bytes()
        False
        b'hello'
    """

    def __init__(self, target: Path, job: Mapping[str, Any], *, overwrite: bool = False) -> None:
        self.target = target
        self.folder = target.with_name(f".{target.name}.permgraph")
        self.job = hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()
        self.overwrite = overwrite
        self.finished: dict[str, str] = {}
        self.complete = ""
        self._lock: IO[bytes] | None = None

    def __enter__(self) -> Staging:
        if not self.folder.exists():
            self._require_place()
        self._take_lock()
        try:
            self._begin()
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, (MismatchError, NonFiniteError)):  # the inputs are at fault: nothing is left to go on from
            with contextlib.suppress(OSError, CheckpointError):  # what is at fault is said by the error that there is
                self._discard()
        self._release()

    def _begin(self) -> None:
        """Read what an earlier run has left, now that no other is at work, and keep what is of use."""
        journal = self._read_journal()
        replaced = self.folder / REPLACED
        if journal is not None and replaced.exists() and not self.target.exists():
            os.replace(replaced, self.target)  # killed between two renames
        if journal is not None and journal["job"] == self.job:
            self.finished, self.complete = dict(journal["finished"]), str(journal["complete"])
        if self.complete and self.target.exists() and not (self.folder / self.complete).exists():
            return  # killed after the last rename: nothing is left to do but to tidy up
        self.complete = ""
        self._require_place()
        if journal is None or journal["job"] != self.job:
            self._clear(everything=journal is not None)
            self.finished = {}
            self._write_journal()
        (self.folder / RESULT).mkdir(exist_ok=True)
        for name in [name for name, digest in self.finished.items() if digest != self._digest(name)]:
            del self.finished[name]

    def _require_place(self) -> None:
        """Raise CheckpointError unless the output may be written where it is to be."""
        if self.target.exists() and not self.overwrite:
            raise CheckpointError(f"{self.target} exists already: choose another name, or say --overwrite")
        if not self.target.parent.is_dir():
            raise CheckpointError(f"{self.target.parent}: no such folder to write {self.target.name!r} in")

    @property
    def resumed(self) -> bool:
        """Whether an earlier run of the same job has left something to go on from."""
        return bool(self.finished)

    def path(self, name: str) -> Path:
        """Where a file of the output is made. Names that begin with a dot are notes of the run, not output,
        but for the description of a distributed checkpoint."""
        note = name.startswith(".") and name != METADATA
        return (self.folder if note else self.folder / RESULT) / name

    def make(self, name: str, write: Callable[[IO[bytes]], str | None]) -> None:
        """Have a file written, unless it is finished already, flush it to the disk, and note it as finished.

        Args:
            name: of the file; may lie in a subfolder.
            write: given the open file, writes it; may return its SHA-256 to save reading it again.

        Raises:
            CheckpointError: the disk is full, or fails.
        """
        if name in self.finished:
            return
        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with path.open("wb") as file:
                digest = write(file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:
            path.unlink(missing_ok=True)  # half a file is of no use to the next run, and may be what fills the disk
            # Where the disk is full, torch raises an error of its own, which does not say so.
            cause = error if isinstance(error, OSError) else error.__context__
            if isinstance(cause, OSError) and cause.filename is None:
                raise CheckpointError(f"{self.target} cannot be written: {cause.strerror or cause}") from error
            raise
        self.finished[name] = digest or _sha256(path)
        self._write_journal()

    def finish(self, only: str | None = None) -> None:
        """Put the output in its place and remove the staging folder.

        A file appears in one step, and takes the place of an older one in that step. A folder that takes the place of
        an older one appears in two, between which there is none.

        Args:
            only: the file that is the output; None if it is the whole folder.
        """
        if not self.complete:
            result = self.folder / RESULT
            made = result if only is None else result / only
            self.complete = str(made.relative_to(self.folder))
            self._write_journal()
            _sync_folder(made if only is None else result)
            replaced = self.folder / REPLACED
            if self.target.is_dir() and not self.target.is_symlink():
                os.replace(self.target, replaced)
            try:
                os.replace(made, self.target)
            except BaseException:
                if replaced.exists() and not self.target.exists():
                    os.replace(replaced, self.target)
                raise
            _sync_folder(self.target.parent)
            if only is not None:
                shutil.rmtree(result)
        self._discard()

    def _discard(self) -> None:
        """Remove the staging folder and all that is in it, its journal after the rest."""
        self._clear(everything=True)
        (self.folder / JOURNAL).unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _digest(self, name: str) -> str | None:
        path = self.path(name)
        return _sha256(path) if path.is_file() else None

    def _read_journal(self) -> dict[str, Any] | None:
        try:
            journal: Any = json.loads((self.folder / JOURNAL).read_bytes())
        except FileNotFoundError:
            return None
        except (ValueError, OSError):
            journal = None
        if not isinstance(journal, dict) or not {"job", "finished", "complete"} <= journal.keys():
            raise CheckpointError(f"{self.folder / JOURNAL} is not a journal of permgraph's: remove {self.folder}")
        return journal

    def _write_journal(self) -> None:
        content = {"job": self.job, "finished": self.finished, "complete": self.complete}
        write_atomically(self.folder / JOURNAL, json.dumps(content, indent=1).encode())

    def _clear(self, *, everything: bool) -> None:
        """Remove what an earlier run left, the journal last of all and not here."""
        for path in self.folder.iterdir():
            if path.name in (JOURNAL, LOCK):
                continue
            if not everything and not path.name.startswith(f".{JOURNAL}"):
                raise CheckpointError(f"{self.folder} holds {path.name!r} and no journal: move it out of the way")
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    def _take_lock(self) -> None:
        """Make the folder, and hold its lock for as long as this run is at work."""
        while self._lock is None:
            self.folder.mkdir(exist_ok=True)
            try:
                lock = (self.folder / LOCK).open("wb")
            except FileNotFoundError:  # the run that had it has just removed the folder
                continue
            if not _locked(lock):
                lock.close()
                raise CheckpointError(f"another run is writing {self.target} (it holds {self.folder})")
            if _is_still(lock, self.folder / LOCK):
                self._lock = lock
            else:  # that run removed it after it was opened here: whoever comes next locks another file
                lock.close()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def _locked(file: IO[bytes]) -> bool:
    """Lock an open file, and tell whether nobody else has; on Windows nothing is locked."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _is_still(file: IO[bytes], path: Path) -> bool:
    """Whether an open file is the one that stands at a path now."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while content := file.read(1 << 22):
            digest.update(content)
    return digest.hexdigest()


def _sync_folder(path: Path) -> None:
    if os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
