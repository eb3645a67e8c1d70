"""The planted world, made once, and runs over it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.saekit.labelling.bench import Bench
from tests.saekit.labelling.planted import World, make_world


@pytest.fixture(scope="session")
def world() -> World:
    return make_world()


@pytest.fixture(scope="session")
def contexts_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("contexts")


@pytest.fixture
def bench(world: World, tmp_path: Path, contexts_folder: Path) -> Callable[..., Bench]:
    """Options of the labelling model -> a run whose files are the test's own."""
    return lambda **options: Bench(world, tmp_path, contexts_folder, **options)
