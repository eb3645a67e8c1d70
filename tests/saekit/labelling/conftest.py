"""The planted world, made once."""

import pytest

from tests.saekit.labelling.planted import World, make_world


@pytest.fixture(scope="session")
def world() -> World:
    return make_world()
