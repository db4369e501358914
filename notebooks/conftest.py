"""The longest notebooks run among the slow tests, `make test-slow`."""

from __future__ import annotations

import pytest

SLOW = ("cifar10_on_colab.ipynb", "dode_in_five_minutes.ipynb")


def pytest_itemcollected(item: pytest.Item) -> None:
    """Marks them."""
    if item.path.name in SLOW:
        item.add_marker(pytest.mark.slow)
