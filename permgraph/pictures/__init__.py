"""Pictures of a spec and of what was done with it: lanes, a page to click through, tables for notebooks."""

from __future__ import annotations
