"""Checks of arguments."""

from pathlib import Path

import pytest

from fastmem.base.arguments import user_path


def test_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if ~ is a directory of that name, or a ~ elsewhere is a home."""
    monkeypatch.setenv("HOME", "/home/me")
    for path, wanted in (
        ("~/x", "/home/me/x"),
        (Path("~/x"), "/home/me/x"),
        ("~", "/home/me"),
        ("./~/x", "~/x"),
        ("a~/x", "a~/x"),
        ("/a/~/x", "/a/~/x"),
        ("x", "x"),
    ):
        assert user_path(path) == Path(wanted)


@pytest.mark.parametrize("path", [None, 3, [1], {"a": 1}, b"x"])
def test_not_a_path(path: object) -> None:
    """Fails if a value that is not a path is a TypeError."""
    with pytest.raises(ValueError, match="a path must be a str or a Path, got"):
        user_path(path)  # type: ignore[arg-type]
