"""A run's learner as a model of MLflow's: config.yaml and the last checkpoint, safetensors and JSON; nothing pickled.

MLflow finds `_load_pyfunc` here by the name of this module. What is served is asked as `clplat.load` is:

    pictures, numbers   an array (N, ...): bytes where white is 255, else float32, in [0, 1] where the run had a white
    texts               a column `text`; token ids (N, 2, L) where the run's texts can't be read
    task                a parameter, where the run was told it or its prompts name the answers to choose from

The answer is a row for each sample: `id` (-1: none), `name`, and `scores`, null for classes out of the question.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from clplat.config.given import keys_of
from clplat.config.settings import AuditSettings, Config, StartSettings, TrackingSettings
from clplat.package import __version__
from clplat.preprocessing import Preprocessing
from clplat.run import checkpoint
from clplat.run.learner import Learner, rebuilt
from clplat.run.rundir import write_config
from clplat.tracking.client import one_line, store_of

FOLDER = "model"  # in the run's
LOGGED_MIB = 64  # of a checkpoint, up to which a learner is logged unless it is said


def faults(config: Config, known: Preprocessing) -> list[str]:
    """Why the learner of a run can't be served; empty where it can."""
    why = _unserved(config, known) if config.tracking.enabled and config.tracking.model else None
    return [] if why is None else [f"tracking.model: true, but {why} (valid: false)"]


def _unserved(config: Config, known: Preprocessing) -> str | None:
    given, why = next(iter(keys_of(config).values()), None), known.refused.get("all")
    if given is not None:
        why = f"{given} was given in Python, and can't be made where the learner is served"
    if known.acting is not None:
        why = "a policy of an agent is not logged"
    return why


def logged(run_dir: Path, config: Config, known: Preprocessing) -> list[Path]:
    """Write the folder `model` of a run that is complete, where it is asked for, or where nothing speaks against it.

    Returns:
        The folder; nothing where the learner is not to be logged, and then an earlier one is removed.
    """
    asked, why = config.tracking.model, ""
    if asked is None:
        asked = _unserved(config, known) is None and store_of(config.tracking, config.output)[0].startswith("sqlite")
        size = sum(file.stat().st_size for last in _kept(run_dir)[-1:] for file in last.rglob("*")) / 2**20
        why = f"its checkpoint has {size:.0f} MiB, more than {LOGGED_MIB}" if asked and size > LOGGED_MIB else ""
    if asked and not why:
        try:
            return [write_model(run_dir, config, known)]
        except Exception as error:
            if config.tracking.model:
                raise
            why = one_line(error)
    shutil.rmtree(run_dir / FOLDER, ignore_errors=True)
    if why:
        line = f"the learner is not logged as a model: {why} (tracking.model: true wants it, false leaves it)"
        print(f"clplat: {line}", file=sys.stderr, flush=True)
    return []


def _kept(run_dir: Path) -> list[Path]:
    """Its checkpoints, the newest last."""
    return sorted(p for p in (run_dir / "checkpoints").glob("[0-9]*") if p.is_dir())


def write_model(run_dir: Path, config: Config, known: Preprocessing) -> Path:
    """Write the folder `model` of a run that is complete, in the place of an earlier one; returns it."""
    import mlflow.pyfunc

    folder = run_dir / FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    last = _kept(run_dir)[-1]
    signature, example = _asked(known)
    with tempfile.TemporaryDirectory(prefix="clplat-model-") as made, _silent():
        data = Path(made) / "learner"
        shutil.copytree(last, data / "checkpoints" / last.name)
        alone = replace(config, audit=AuditSettings(), tracking=TrackingSettings(enabled=False), start=StartSettings(),
                        reference=None)  # fmt: skip
        write_config(data / "config.yaml", alone)
        mlflow.pyfunc.save_model(
            str(folder), loader_module=__name__, data_path=str(data), signature=signature, input_example=example,
            pip_requirements=[f"clplat=={__version__}"],
        )  # fmt: skip
    return folder


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep off the screen what MLflow says of parts of it that are not used here."""
    logger = logging.getLogger("mlflow")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _asked(known: Preprocessing) -> tuple[Any, Any]:
    """MLflow's signature, and an example of an input, which is drawn: no sample of the run stands in it."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema, TensorSpec
    from mlflow.types.schema import Array, DataType

    answer = Schema([ColSpec("long", "id"), ColSpec("string", "name", required=False),
                     ColSpec(Array(DataType.double), "scores", required=False)])  # fmt: skip
    told = ParamSchema([ParamSpec("task", "long", -1)])  # -1: none, which a run that was told the task refuses
    if known.text is not None:
        import pandas

        example: Any = pandas.DataFrame({"text": ["an example"]})
        return ModelSignature(Schema([ColSpec("string", "text")]), answer, told), example
    kind = np.int64 if known.ids else np.uint8 if known.white == 255 else np.float32
    draw, shape = np.random.default_rng(0), (2, *known.shape)
    example = (draw.integers(0, 3, shape) if kind is not np.float32 else draw.random(shape)).astype(kind)
    return ModelSignature(Schema([TensorSpec(np.dtype(kind), (-1, *known.shape))]), answer, told), example


class Served:
    """What MLflow calls.

    Args:
        learner: loaded.
    """

    def __init__(self, learner: Learner) -> None:
        self.learner = learner

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> Any:
        """A pandas DataFrame of `id`, `name` and `scores` for inputs as the signature has them."""
        import pandas

        task = int((params or {}).get("task", -1))
        inputs = list(model_input["text"]) if isinstance(model_input, pandas.DataFrame) else model_input
        said = self.learner(inputs, task=None if task < 0 else task)
        scores: list[Any] = [None] * len(said)
        if said.scores is not None:
            scores = [[value if np.isfinite(value) else None for value in row] for row in said.scores.tolist()]
        return pandas.DataFrame({"id": said.ids.tolist(), "name": said.names, "scores": scores})


def _load_pyfunc(path: str) -> Served:
    """What MLflow makes of the folder that `write_model` gave it."""
    from clplat.config.resolve import resolve

    state, notes = checkpoint.load_newest(Path(path) / "checkpoints")
    if state is None:
        raise RuntimeError(*notes)
    return Served(rebuilt(resolve(config=Path(path) / "config.yaml"), state, Path(path)))
