from __future__ import annotations

import pytest

from prunella import native


def test_kernels_of_another_version_are_not_used(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    if native.library() is None:
        pytest.skip("there are no kernels")
    native.library.cache_clear()
    monkeypatch.setattr(native, "VERSION", native.VERSION + 1)
    assert native.library() is None
    assert "install it again" in capsys.readouterr().err
    native.library.cache_clear()
