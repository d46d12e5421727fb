"""Fixtures of the data commands are those of the data tests."""

from tests.data.conftest import refer_folder, refer_root, world

__all__ = ["refer_folder", "refer_root", "world"]
