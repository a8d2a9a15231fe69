"""Fixtures for tests of whole runs: small, quiet, untracked, in a folder of their own, one thread unless told."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mixed import mixed_config
from supporting import pytest_runtest_logreport, pytest_sessionfinish, seen

__all__ = ["pytest_runtest_logreport", "pytest_sessionfinish", "seen"]  # hooks and fixtures of all tests

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background of a script; children would ignore it, too
    signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))  # small models: more cost more than they bring

# scikit-learn sets the first two where it is imported, JAX (which Avalanche's dependencies import) the next,
# MLflow's client the last but one, torch the last where it compiles.
SET_BY_LIBRARIES = (
    "KMP_INIT_AT_FORK",
    "KMP_DUPLICATE_LIB_OK",
    "TF_CPP_MIN_LOG_LEVEL",
    "TPU_SKIP_MDS_QUERY",
    "PYGAME_HIDE_SUPPORT_PROMPT",
    "SDL_AUDIODRIVER",
    "_MLFLOW_TELEMETRY_SESSION_ID",
    "_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR",
)


@pytest.fixture
def run_mixed(tmp_path: Path) -> Callable[..., Any]:
    """Runs the mixed stream: `run_mixed(loop={...}, **{"strategy.memory": 10})` gives a Result."""
    import clplat

    def start(**overrides: Any) -> Any:
        return clplat.run(mixed_config(tmp_path), quiet=True, **overrides)

    return start


@pytest.fixture
def make_runner() -> Iterator[Callable[..., Any]]:
    """Makes runners, of the mixed stream unless another is given, without files unless a run directory is; closes their
    logs."""
    from clplat.config.resolve import resolve
    from clplat.run.build import build_strategy, build_stream, new_record
    from clplat.run.launch import make_fabric
    from clplat.run.loop import Runner
    from clplat.run.merging import build_merge
    from clplat.run.runlog import RunLog

    logs = []

    def make(
        run_dir: Path | None = None, offset: int = 0, of: dict[str, Any] | None = None, **overrides: Any
    ) -> Runner:
        config = resolve(config=of or mixed_config(run_dir or Path("unused")), **overrides)
        stream = build_stream(config)
        strategy = build_strategy(config, stream.input_shape, stream.num_classes, seed=config.seed)
        fabric = make_fabric(config.fabric)
        fabric.launch()
        logs.append(RunLog(run_dir, 0.0, offset=offset))
        runner = Runner(strategy, stream, config.loop, fabric, config.seed, logs[-1], new_record(stream, None))
        runner.merge = build_merge(config)
        return runner

    yield make
    for log in logs:
        log.close()


@pytest.fixture(autouse=True)
def nothing_leaks() -> Iterator[None]:
    """Fail a test that leaves behind a thread that is no daemon, an environment variable, or another folder."""
    before = {t.ident for t in threading.enumerate()}, dict(os.environ), Path.cwd()
    yield
    threads = [t for t in threading.enumerate() if t.ident not in before[0] and not t.daemon]
    for thread in threads:  # transformers asks the threads that read weights to end, and does not wait for them
        thread.join(5)
    threads = [t for t in threads if t.is_alive()]
    assert not threads, f"left running: {threads}"
    changed = {k for k in os.environ.keys() | before[1].keys() if os.environ.get(k) != before[1].get(k)}
    changed -= {"PYTEST_CURRENT_TEST", *SET_BY_LIBRARIES}
    assert not changed, f"environment changed: {changed}"
    assert Path.cwd() == before[2]
