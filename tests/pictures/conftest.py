"""A headless browser, where the machine has one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A running Chromium; skips where there is none, saying what to install."""
    api = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install 'permgraph[test]'"
    )
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    with api.sync_playwright() as playwright:
        try:
            # No sandbox: containers seldom allow it, and the pages are our own.
            running = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        except api.Error as error:
            said = str(error).strip().splitlines()[0]
            pytest.skip(f"no Chromium runs here (`make browser` installs one): {said}")
        yield running
        running.close()
