"""What tests of modules share."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from tests.support.lookalikes import PACKAGES


@pytest.fixture
def importable_lookalikes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has Python find the stand-ins for other libraries' modules when it unpickles them."""
    for package in PACKAGES:
        monkeypatch.setitem(sys.modules, package, sys.modules.get(package, ModuleType(package)))
