"""Tiny random weights for all tests of this folder."""

import pytest

from deris_llm.testing import tiny_weights


@pytest.fixture(scope="session")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return tiny_weights(tmp_path_factory.mktemp("weights"))
