"""What several files of this folder need."""

import pytest

from supra.testing import tiny_checkpoint


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A tiny checkpoint to convert."""
    folder = tmp_path_factory.mktemp("base")
    tiny_checkpoint(folder)
    return folder
