"""Checkpoints without the weights that are as they were read: what counts as that, and how they are found again."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mixed import mixed_config
from safetensors import safe_open
from safetensors.torch import save, save_file
from texts import write_sets
from torch import Tensor

import clplat
from clplat.cli import main
from clplat.components.ema import Frozen
from clplat.components.state import flatten
from clplat.config.resolve import resolve
from clplat.errors import Interrupted, MissingError, UserError
from clplat.run import checkpoint, sources
from clplat.run.build import build
from clplat.run.loop import Runner
from clplat.run.sources import Sources
from clplat.strategy import Strategy
from clplat.stream import Experience, Kind

HERE = Path(__file__)


# --- which tensors are as they were read ------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    content = {"square": torch.randn(80, 80), "wide": torch.randn(40, 300), "half": torch.randn(100, 200).bfloat16()}
    save_file(content, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def held(file: Path) -> dict[str, Tensor]:
    with safe_open(file, "pt") as content:
        return {name: content.get_tensor(name).clone() for name in content.keys()}  # noqa: SIM118 - it is no dict


def test_a_tensor_is_known_by_its_content_whatever_holds_it(file: Path) -> None:
    read = held(file)
    cast, turned = read["half"].float(), read["wide"].T.contiguous()
    known = Sources([file], [read["square"], cast, turned])
    model = torch.nn.Linear(80, 80)
    model.weight.data = read["square"].clone()
    frozen = Frozen(model).model.weight
    assert known.place(frozen) == sources.Place(file, "square", False, "float32")  # type: ignore[arg-type]
    assert known.place(cast.clone()) == sources.Place(file, "half", False, "float32")
    assert known.place(turned.clone()) == sources.Place(file, "wide", True, "float32")
    assert known.place(read["square"].T) is None
    assert known.place(read["half"]) is None  # not as the learner had it


CHANGES: list[Callable[[Tensor], Any]] = [
    lambda t: t.data.add_(1e-3 * torch.randn_like(t)),  # as adapters are merged, which no version counter tells
    lambda t: t.numpy().__setitem__((40, 41), 0.5),
    lambda t: t.neg_(),
    lambda t: t.mul_(2),
    lambda t: t.view(torch.int32).__ior__(1),
    lambda t: t.copy_(t[torch.randperm(80)]),
    lambda t: t.copy_(t[:, torch.randperm(80)]),
    lambda t: t[3:5].copy_(t[[4, 3]].clone()),
    lambda t: t[-1, 1::2].neg_(),
]


@pytest.mark.parametrize("change", CHANGES)
def test_no_change_is_missed(file: Path, change: Callable[[Tensor], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_sample", lambda tensor, dtype: b"")  # the few elements that are looked at first
    tensor = held(file)["square"]
    known = Sources([file], [tensor])
    assert known.place(tensor) is not None
    with torch.no_grad():
        change(tensor)
    assert known.place(tensor) is None


def test_every_word_of_every_block_counts() -> None:
    torch.manual_seed(0)
    for count in (sources._BLOCK, 2 * sources._BLOCK + 5):
        tensor = torch.randn(count)
        before = sources._content(tensor)
        for at in (0, 1, sources._BLOCK - 1, count - 1):
            for bit in (0, 23, 31):
                changed = tensor.clone()
                changed.view(torch.int32)[at] ^= torch.tensor(1 << bit, dtype=torch.int64).to(torch.int32)
                assert sources._content(changed) != before
        assert sources._content(tensor.clone()) == before


def test_what_was_drawn_has_no_place(file: Path) -> None:
    drawn = torch.randn(80, 80)
    assert Sources([file], [drawn]).place(drawn) is None
    assert Sources([], [drawn]).place(drawn) is None


@pytest.mark.parametrize("change", [lambda t: t[40, 41].mul_(2), lambda t: t[40, 42].neg_()])
def test_what_loading_has_changed_is_compared_bit_for_bit(tmp_path: Path, change: Callable[[Tensor], Any]) -> None:
    """In elements that are not looked at first; a zero of the other sign is an equal number, but another content."""
    stored = torch.ones(80, 80)
    stored[40, 42] = 0.0
    save_file({"square": stored}, tmp_path / "model.safetensors")
    tensor = stored.clone()
    assert Sources([tmp_path / "model.safetensors"], [tensor]).place(tensor) is not None
    change(tensor)
    assert sources._sample(tensor, tensor.dtype) == sources._sample(stored, stored.dtype)
    assert Sources([tmp_path / "model.safetensors"], [tensor]).place(tensor) is None


def test_a_file_that_changes_under_a_run_is_named(file: Path) -> None:
    tensor = held(file)["square"]
    known = Sources([file], [tensor])
    known.facts(file)
    save_file({"square": tensor + 1}, file)
    with pytest.raises(UserError, match=r"model\.safetensors was changed or taken away while a run stands on it"):
        known.facts(file)
    file.unlink()
    with pytest.raises(UserError, match=r"model\.safetensors was changed or taken away"):
        known.facts(file)


# --- whole runs -------------------------------------------------------------------------------------------------------


class Merging(Strategy):
    """Its backbone is frozen, and changed in place after the first experience, in a way that counts no version."""

    kinds = frozenset({Kind.LEARN})
    paper = "none: a test"

    def __init__(self, **base: Any) -> None:
        super().__init__(**base)
        self.requires_grad_(False)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Learns nothing."""

    def end(self, experience: Experience) -> None:
        if experience.index == 0:
            last = [p for p in self.model.parameters() if p.ndim == 2][-1]
            last.data[1:3] += 0.25  # type: ignore[index]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small Llama, its embedding tied, in half precision, below a data root."""
    import transformers

    monkeypatch.setenv("CLPLAT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CLPLAT_DATA", str(tmp_path / "root"))
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, tie_word_embeddings=True,
    )  # fmt: skip
    path = tmp_path / "root" / "weights" / "tiny"
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture
def config(folder: Path, tmp_path: Path) -> dict[str, Any]:
    sets = write_sets(tmp_path / "sets")
    return {
        "strategy": {"name": "lora", "lr": 1e-2},
        "stream": {"name": "text", "benchmark": "jsonl", "path": str(sets), "tasks": ["color", "size"],
                   "tokenizer": "bytes", "max_length": 32},
        "backbone": {"name": "language_model", "weights": "tiny"},
        "loop": {"batch_size": 4, "checkpoint_seconds": None, "representation": False},
        "fabric": {"accelerator": "cpu"},
        "tracking": {"enabled": False},
        "output": str(tmp_path / "runs"),
    }  # fmt: skip


def ran(config: dict[str, Any], **more: Any) -> Path:
    return Path(clplat.run(config, quiet=True, **more).run_dir)


def newest(run_dir: Path) -> Path:
    return sorted((run_dir / "checkpoints").iterdir())[-1]


def written(run_dir: Path) -> dict[str, Tensor]:
    """What the newest checkpoint holds itself."""
    return held(newest(run_dir) / "tensors.safetensors")


def elsewhere(run_dir: Path) -> dict[str, Any]:
    with safe_open(newest(run_dir) / "tensors.safetensors", "pt") as content:
        return json.loads((content.metadata() or {}).get("elsewhere", "{}"))


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(v, b[k]) if isinstance(v, Tensor) else v == b[k] for k, v in a.items()
    )


def test_adapters_alone_are_written_and_a_whole_checkpoint_gives_the_same_learner(config: dict[str, Any]) -> None:
    small, whole = ran(config), ran(config, **{"loop.checkpoint_whole": True})
    large = [n for n in written(small) if "lora_" not in n and written(small)[n].nbytes >= sources.SMALLEST]
    assert [n for n in large if n.startswith("/strategy")] == []
    assert any("embed_tokens" in n for n in written(whole))
    assert not elsewhere(whole).get("files")
    assert same(clplat.load(small).state_dict(), clplat.load(whole).state_dict())
    summaries = [json.loads((r / "summary.json").read_text()) for r in (small, whole)]
    assert summaries[0]["metrics"] == summaries[1]["metrics"]
    assert summaries[0]["config_sha256"] == summaries[1]["config_sha256"]  # it changes no result


def test_what_is_written_is_what_the_learner_ended_as(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for strategy in ("naive", {"name": f"{HERE}:Merging"}, "ewc", "svd_orthogonal"):
        ended: list[dict[str, Any]] = []
        finish, config["strategy"] = Runner.run, strategy
        with monkeypatch.context() as patch:
            patch.setattr(Runner, "run", lambda self, finish=finish, ended=ended: (finish(self), ended.append(self)))
            run_dir = ran(config)
        assert same(clplat.load(run_dir).state_dict(), ended[0].strategy.state_dict()), strategy  # type: ignore[attr-defined]


def test_weights_merged_in_place_are_written_and_no_others(config: dict[str, Any]) -> None:
    config["strategy"] = {"name": f"{HERE}:Merging"}
    large = [n for n, t in written(ran(config)).items() if n.startswith("/strategy") and t.nbytes >= sources.SMALLEST]
    assert len(large) == 1


def test_tied_weights_are_written_once(config: dict[str, Any]) -> None:
    config["strategy"] = "naive"
    run_dir = ran(config)
    names = [n for n in written(run_dir) if n.endswith(("embed_tokens.weight", "lm_head.weight"))]
    assert len(names) == 1
    assert len(elsewhere(run_dir)["same"]) == 1
    learner: Any = clplat.load(run_dir)
    net = learner.model.backbone.net
    assert net.lm_head.weight is net.model.embed_tokens.weight


@pytest.mark.parametrize("strategy", ["lora", "naive"])
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not(
    config: dict[str, Any], strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config["strategy"] = {"name": strategy, "lr": 1e-2}
    straight, original = ran(config), Runner._between_steps

    def interrupt(self: Runner, experience: Experience) -> None:
        self.stop_requested = self.progress.experience == 1 and self.progress.steps == 2
        original(self, experience)

    with monkeypatch.context() as patch:
        patch.setattr(Runner, "_between_steps", interrupt)
        with pytest.raises(Interrupted):
            clplat.run(config, quiet=True, name="cut")
    (cut,) = (Path(config["output"]) / "cut").iterdir()
    result = clplat.resume(cut, quiet=True)
    assert result.summary["metrics"] == json.loads((straight / "summary.json").read_text())["metrics"]
    assert same(clplat.load(cut).state_dict(), clplat.load(straight).state_dict())


def test_a_run_starts_from_one_whose_checkpoints_name_their_weights(config: dict[str, Any], tmp_path: Path) -> None:
    config["strategy"] = {"name": f"{HERE}:Merging"}
    first = ran(config)
    second = ran(config, start={"run": str(first)}, **{"loop.max_steps": 1, "loop.stop_after": 1, "strategy": "lora"})
    before = {n.removeprefix("model."): t for n, t in clplat.load(first).state_dict().items() if n.startswith("model.")}
    after = {
        n.replace(".base_layer", "").removeprefix("model."): t for n, t in clplat.load(second).state_dict().items()
    }
    assert all(torch.equal(after[n], t) for n, t in before.items() if n.startswith("backbone.") and t.nbytes > 1000)
    assert elsewhere(second)["tensors"]  # what the first left as it was read
    assert any(t.nbytes >= sources.SMALLEST for n, t in written(second).items() if "lora_" not in n)  # what it changed


# --- found again, or refused ------------------------------------------------------------------------------------------


def test_another_file_in_the_place_is_refused(
    config: dict[str, Any], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, file = ran(config), folder / "model.safetensors"
    whole, other = held(file), file.stat().st_size
    name = next(n for n in whole if n.endswith("q_proj.weight"))
    whole[name][0, 0] += 1
    save_file(whole, file, metadata={"format": "pt"})
    assert file.stat().st_size == other  # of the same size: only the digest tells
    says = r"checkpoint: .*tiny/model\.safetensors is not the file whose .* put the \d+ bytes with SHA-256 [0-9a-f]{64}"
    with pytest.raises(UserError, match=says):
        clplat.load(run_dir)
    assert main(["run", "--resume", str(run_dir), "--quiet"]) == 2
    assert len([x for x in capsys.readouterr().err.splitlines() if "is not the file whose" in x]) == 1


def test_a_missing_file_is_asked_for(config: dict[str, Any], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = ran(config)
    (folder / "model.safetensors").unlink()
    with pytest.raises(MissingError, match=r"checkpoint: no file at .*tiny/model\.safetensors.* put the \d+ bytes"):
        clplat.load(run_dir)
    assert main(["run", "--resume", str(run_dir), "--quiet"]) == 3
    assert "model.safetensors" in capsys.readouterr().err


def test_a_whole_checkpoint_is_read_without_its_file_but_for_the_structure(
    config: dict[str, Any], folder: Path
) -> None:
    run_dir = ran(config, **{"loop.checkpoint_whole": True})
    (folder / "model.safetensors").unlink()
    state, notes = checkpoint.load_newest(run_dir / "checkpoints")
    assert state is not None
    assert not notes
    assert any("embed_tokens" in name for name in state["strategy"])


def test_a_run_is_read_where_the_data_root_is_another(
    config: dict[str, Any], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = ran(config)
    before = clplat.load(run_dir).state_dict()
    shutil.move(tmp_path / "root", tmp_path / "elsewhere")
    monkeypatch.setenv("CLPLAT_DATA", str(tmp_path / "elsewhere"))
    assert same(clplat.load(run_dir).state_dict(), before)
    shutil.copytree(tmp_path / "elsewhere", tmp_path / "root")  # a wrong one where it was: the right one is found
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    assert same(clplat.load(run_dir).state_dict(), before)


def test_checkpoints_of_before_are_read(config: dict[str, Any], tmp_path: Path) -> None:
    """All tensors in one file of the same format, tied ones twice; a configuration without the newer key."""
    run_dir = ran(config)
    state, _ = checkpoint.load_newest(run_dir / "checkpoints")
    assert state is not None
    del state["config"]["loop"]["checkpoint_whole"], state["spent"]["save_seconds"]
    tensors: dict[str, Tensor] = {}
    body = json.dumps(flatten(state, tensors))
    blob = save({name: t.clone().contiguous() for name, t in tensors.items()})
    digests = {"state_sha256": checkpoint._sha(body.encode()), "tensors_sha256": checkpoint._sha(blob)}
    before = clplat.load(run_dir).state_dict()
    (newest(run_dir) / "tensors.safetensors").write_bytes(blob)
    (newest(run_dir) / "state.json").write_text(json.dumps(digests | {"state": body}))
    assert same(clplat.load(run_dir).state_dict(), before)
    assert clplat.resume(run_dir, quiet=True).summary["status"] == "complete"


def test_nothing_of_a_checkpoint_is_held_through_the_run_that_goes_on(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import gc

    run_dir, left = ran(config), list[int]()

    def run(self: Runner) -> None:
        gc.collect()
        embedding = next(t for n, t in self.strategy.state_dict().items() if "embed_tokens" in n)
        mine = {p.data_ptr() for p in self.strategy.state_dict().values() if isinstance(p, Tensor)}
        others = [o for o in gc.get_objects() if type(o) in (Tensor, torch.nn.Parameter) and o.shape == embedding.shape]
        left.append(len([o for o in others if o.dtype == embedding.dtype and o.data_ptr() not in mine]))

    monkeypatch.setattr(Runner, "run", run)
    clplat.resume(run_dir, quiet=True)
    assert left == [0]


def test_a_run_of_weights_that_were_drawn_names_no_file(tmp_path: Path) -> None:
    run_dir = Path(clplat.run(mixed_config(tmp_path), quiet=True, **{"loop.stop_after": 1}).run_dir)
    assert elsewhere(run_dir) == {}
    assert any(name.startswith("/strategy/model.backbone") for name in written(run_dir))


def test_files_of_weights_are_found_by_every_name_they_go_by(config: dict[str, Any], folder: Path) -> None:
    from clplat.backbones._weights import files_read

    for name in ("tiny", str(folder)):
        config["backbone"]["weights"] = name
        assert files_read(build(resolve(config=config))[1]) == [folder / "model.safetensors"]


def test_the_digest_of_a_large_file_is_taken_beside_the_loop(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = set()
    monkeypatch.setattr(sources, "digest", lambda path: threads.add(threading.current_thread()) or "0" * 64)
    sources._sha256.cache_clear()
    ran(config)
    sources._sha256.cache_clear()
    assert threads
    assert threading.main_thread() not in threads


def test_the_place_in_the_hubs_cache_is_found_on_another_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    was = Path("/home/other/.cache/huggingface/hub/models--a--b/snapshots/0123/model.safetensors")
    assert tmp_path / "models--a--b" / "snapshots" / "0123" / "model.safetensors" in sources._candidates(was, None)


def test_only_files_that_are_there_are_named(tmp_path: Path) -> None:
    assert os.listdir(tmp_path) == []
    with pytest.raises(FileNotFoundError):
        Sources([tmp_path / "gone.safetensors"], [])
