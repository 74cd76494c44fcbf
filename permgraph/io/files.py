"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import uuid
from pathlib import Path


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Write ``content`` to ``path`` by way of a new file beside it, so that no reader ever meets half of it.

    Raises:
        OSError: it cannot be written there; the error names ``path``, and not the file beside it.
    """
    target = Path(path)
    beside = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        with beside.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, target)
    except OSError as error:
        if error.filename is None:
            raise
        raise OSError(error.errno, error.strerror, str(target)) from error  # which makes the error of the same kind
    finally:
        with contextlib.suppress(OSError):  # there may be no such folder
            beside.unlink(missing_ok=True)
