"""Where things are that tests read: the checkout, the small copy of recorded numbers, and the full one beside it."""

from __future__ import annotations

from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
SMALL = TESTS / "golden"
SHARED = ROOT.parent / "shared"
GOLDEN = SHARED / "golden"
