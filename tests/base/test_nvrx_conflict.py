"""An old NVRx does not prevent the import of megatron-core."""

import importlib.machinery
import sys
import types

import pytest

from megatron_hybrid.base import nvrx_conflict

PACKAGE, HIDDEN = "nvidia_resiliency_ext", nvrx_conflict._ASYNC_CHECKPOINTS


@pytest.mark.parametrize(
    ("version", "hidden"),
    [("0.4.1", True), ("0.5.0", True), ("0.6.0", False), ("1.0", False), ("unknown", True), (None, True)],
)
def test_versions(version, hidden, monkeypatch):
    module = types.ModuleType(PACKAGE)
    module.__spec__ = importlib.machinery.ModuleSpec(PACKAGE, None)
    monkeypatch.setitem(sys.modules, PACKAGE, module)
    monkeypatch.delitem(sys.modules, HIDDEN, raising=False)

    def installed(name: str) -> str:
        if version is None:
            raise nvrx_conflict.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(nvrx_conflict, "version", installed)
    nvrx_conflict.hide_old_async_checkpoints()
    assert (sys.modules.get(HIDDEN, "not hidden") is None) == hidden
    monkeypatch.setitem(sys.modules, HIDDEN, None)  # removed after the test


def test_nothing_is_hidden_where_it_is_not_installed(monkeypatch):
    monkeypatch.setattr(nvrx_conflict, "find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, HIDDEN, raising=False)
    nvrx_conflict.hide_old_async_checkpoints()
    assert HIDDEN not in sys.modules
