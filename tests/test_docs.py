"""Every block of Python in the README and the documentation runs, and prints what the block after it says."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(?P<language>\S*)[ ]*(?P<title>[^\n]*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


def _blocks(page: Path) -> list[tuple[str, str | None, int]]:
    """Return a page's Python blocks: the code, what it must print (None: anything), and its line in the page."""
    text = page.read_text(encoding="utf-8")
    fences = list(FENCE.finditer(text))
    found = []
    for number, fence in enumerate(fences):
        if fence["language"] == "python":
            following = fences[number + 1] if number + 1 < len(fences) else None
            output = following["text"] if following is not None and "output" in following["title"] else None
            found.append((fence["text"], output, text.count("\n", 0, fence.start()) + 2))
    return found


def test_blocks_are_found() -> None:
    assert sum(len(_blocks(page)) for page in PAGES) > 10
    assert sum(output is not None for page in PAGES for _, output, _ in _blocks(page)) > 3


@pytest.mark.parametrize("page", [page for page in PAGES if _blocks(page)], ids=lambda page: page.stem)
def test_code_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    with torch.random.fork_rng():
        for code, expected, line in _blocks(page):
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                # Blank lines in front give the block's own line numbers to a traceback.
                exec(compile("\n" * (line - 1) + code, str(page), "exec"), names)
            if expected is not None:
                assert printed.getvalue().strip() == expected.strip(), f"{page.name}:{line} prints something else"
