"""One local Ray for the whole session, and tiny data."""

from __future__ import annotations

import os
import secrets
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# For the clusters of several machines that tests start; a Ray of raysl's own has a token of its own.
os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_DATA_USE_DATASOURCE_V2"] = "0"
os.environ["RAY_DATA_DISABLE_PROGRESS_BARS"] = "1"
os.environ["RAY_TRAIN_ENABLE_PRINT_PATCH"] = "0"
os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.3"
os.environ["RAY_TRAIN_COLLECTIVE_TIMEOUT_S"] = "60"
os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
# The tensors of tests are small: with more threads most of the time goes into waiting for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# At the default of 15, other programs of a busy machine starve the workers, and tests time out.
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112
# Tests that were started in the background of a script or by nohup ignore these signals, and so would their programs.
for _number, _handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)


# These files take longest. They come first, or one process would end with them while the other has nothing to do.
LONGEST = (
    "tests/training/",
    "tests/extraction/",
    "tests/ray_cluster/",
    "tests/tuning/",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first."""
    items.sort(key=lambda item: not item.nodeid.startswith(LONGEST))


@pytest.fixture(autouse=True)
def _ray_where_it_is_tested(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests with the mark `ray` work on Ray also on a small machine; others work there as a user's commands do."""
    if request.node.get_closest_marker("ray"):
        monkeypatch.setenv("RAY_ADDRESS", "local")


@pytest.fixture(autouse=True)
def _commands_leave_the_process_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the Ray that tests share when a command is refused, and import whole modules after it."""
    monkeypatch.setattr("raysl.cli.lazy.install_import_hook", lambda: None)
    if "ray" in sys.modules:
        monkeypatch.setattr("ray.shutdown", lambda: None)


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A local Ray of two CPUs, shared by every test that asks for it."""
    from raysl.ray_cluster import local_ray

    local_ray.start(num_cpus=2, object_store_memory=300_000_000, log_to_driver=False)
    yield
    local_ray.stop()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real images beside the checkout, where a developer's machine has them."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no folder of real images beside the checkout")
    return folder
