"""Every strategy with adapters, with weights and passes in each precision, from nothing and from another run."""

from pathlib import Path

import pytest
import torch
from texts import write_sets

import clplat
from clplat.errors import UserError

pytestmark = pytest.mark.slow
STRATEGIES = ("lora", "olora", "ilora", "moram", "svd_orthogonal")


def run(strategy, folder, **options):
    sets = folder / "sets"
    if not sets.is_dir():
        write_sets(sets)
    given = {"stream.benchmark": "jsonl", "stream.path": str(sets), "stream.tasks": ["color", "size"],
             "stream.tokenizer": "bytes", "stream.max_length": 32, "backbone.vocabulary": 300, "backbone.dim": 16,
             "backbone.depth": 1, "backbone.heads": 2, "loop.max_steps": 3, "loop.batch_size": 4,
             "loop.representation": False}  # fmt: skip
    fixed = {"stream": "text", "backbone": "language_model", "quiet": True, "tracking": {"enabled": False}}
    return clplat.run(strategy=strategy, output=str(folder / "runs"), **fixed, **{**given, **options})


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    return run("naive", tmp_path_factory.mktemp("start"), **{"strategy.lr": 0.5}).run_dir


@pytest.mark.parametrize("begun", [False, True], ids=["random", "start.run"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_it_runs_or_is_refused_before_it_does(strategy, dtype, precision, begun, start, tmp_path):
    options = {"backbone.dtype": dtype, "fabric.precision": precision} | ({"start.run": str(start)} if begun else {})
    if strategy == "svd_orthogonal" and dtype == "bfloat16":
        with pytest.raises(UserError, match=r"backbone\.dtype: bfloat16 loses most steps of the weights, which SVD"):
            run(strategy, tmp_path, **options)
        assert not (tmp_path / "runs").exists()
        return
    found = run(strategy, tmp_path, **options)
    assert all(a is not None for row in found.accuracy_matrix for a in row)
    learner = clplat.load(found.run_dir)
    weights = {n: p for n, p in learner.model.backbone.named_parameters() if n.endswith("embed_tokens.weight")}
    (embedding,) = weights.values()  # adapted by none of them; trained by svd_orthogonal alone
    assert embedding.dtype == getattr(torch, dtype)
    if begun and strategy != "svd_orthogonal":
        (begin,) = (p for n, p in clplat.load(start).model.backbone.named_parameters() if n in weights)
        assert torch.equal(embedding, begin.to(embedding.dtype))
