"""The old home of `verify`, so that ``from permgraph.verify import verify`` goes on working."""

from permgraph.verification import Verification, verify

__all__ = ["Verification", "verify"]
