"""Settings of a run that belong to no strategy, stream or backbone. Imports no torch: `--help` reads this."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal


@dataclass
class LoopSettings:
    """The loop over a stream.

    Args:
        max_epochs: passes over each experience's training data, ≥ 1 (or 0 with `start.run`: what was learned there
            is not learned again); of an interact experience over its recorded transitions, before the environment; not
            used by adapt.
        forget_epochs: passes over the data of a forget request, ≥ 1; null takes max_epochs.
        max_steps: optimizer steps per experience at most; null for no bound beside max_epochs. Of an interact
            experience it bounds those on recorded transitions alone.
        max_flops: floating-point operations of training per learn experience or request at most, over all processes,
            as `train_flops` counts them and weighted by memory_ratio, > 0: as many steps are taken as that buys, within
            max_epochs and max_steps; null for no bound.
        memory_ratio: with max_flops, peak memory of this method over that of full fine-tuning, > 0 (memory-adjusted
            FLOPs, MAFs): of `peak_device_bytes` of two runs, say.
        max_env_steps: steps in the environment of an interact experience at most; null for as many as the stream says.
        batch_size: samples per batch and process, ≥ 1.
        eval_batch_size: samples per evaluation batch, ≥ 1; no figure depends on it but in its last digits. Where
            predictions take the statistics of their batch (test-time adaptation with batch normalisation), batches hold
            512 samples whatever it is.
        clip_norm: largest gradient norm; null does not clip.
        accumulate: batches per optimizer step, ≥ 1; batch normalisation takes the statistics of each of them.
        eval_every: also evaluate every so many optimizer steps (anytime accuracy, stability gap); null only after
            each experience. The return of an interact experience: every so many steps in its environment.
        log_every: read losses from the device, check that they are finite and log their mean every so many batches and
            at the end of an experience, ≥ 1; they are checked before each checkpoint, too.
        eval_samples: test samples per experience in those extra evaluations; null takes all.
        evaluate: all scores every test set after each experience; seen, those of the experiences met so far; last, that
            of the experience just finished, and at the end of the stream all. Both also take that of a request which
            comes next. Metrics that need a score left out are null with that reason: forward transfer; with last also
            forgetting, stability and means over rows.
        evaluate_on: test, or valid for choosing hyper-parameters.
        checkpoint_every: save after so many steps, and wait until that is on the disk; null only at experience
            boundaries and by time, written while the run goes on. While acting, a step in the environment after which
            nothing is trained counts as one too.
        checkpoint_seconds: save after so many seconds, and at experience boundaries, or later where that would take
            more than 2 % of the time (never later at the boundaries of a request or at the stream's end); null only at
            experience boundaries, all of them, and by steps.
        checkpoint_whole: write weights, too, that are as they were read from a .safetensors file; false names the file
            and its SHA-256, and needs it to read the checkpoint.
        checkpoint_sharded: under `fabric.strategy: fsdp` each process writes its own part of weights and moments, in a
            file of its own, and none brings the whole together; the run waits until they are on the disk. What is as it
            was read is written, too.
        memory_on_disk: inputs that bounded replay memories hold are in a file of the run's folder, which changes no
            result; checkpoints hold which of its rows are whose.
        representation: measure dormant units, effective rank and norms after each experience.
        diagnostics: also measure after each experience, at a cost: intruder_dimensions (three singular value
            decompositions of each adaptable layer) and tuning_contribution (a pass over up to 256 texts, of a language
            model); both keep a copy of the backbone as the run began, and checkpoints hold it.
        keep_predictions: keep the predictions of adapt experiences, with labels and rows, in the run's folder (and, of
            the current one, in checkpoints): n · C numbers each.
        eval_episodes: episodes per evaluation of an interact experience, ≥ 1.
        eval_frames: frames kept of an evaluation episode at the hand-over and of one at the end of an interact
            experience, for the report, ≥ 0; needs an environment that renders without a screen (MuJoCo: MUJOCO_GL=egl).
        stop_after: stop after so many experiences; null runs all.
        activation_checkpointing: keep no activations within the blocks of a backbone: they are computed again in the
            backward pass. Less memory, the same numbers, more time.
    """

    max_epochs: int = 1
    forget_epochs: int | None = None
    max_steps: int | None = None
    max_flops: float | None = None
    memory_ratio: float = 1.0
    max_env_steps: int | None = None
    batch_size: int = 32
    eval_batch_size: int = 512
    clip_norm: float | None = None
    accumulate: int = 1
    eval_every: int | None = None
    log_every: int = 50
    eval_samples: int | None = None
    evaluate: Literal["all", "seen", "last"] = "all"
    evaluate_on: Literal["test", "valid"] = "test"
    checkpoint_every: int | None = None
    checkpoint_seconds: float | None = 60.0
    checkpoint_whole: bool = False
    checkpoint_sharded: bool = False
    memory_on_disk: bool = False
    representation: bool = True
    diagnostics: list[Literal["intruder_dimensions", "tuning_contribution"]] = field(default_factory=list)
    keep_predictions: bool = False
    eval_episodes: int = 5
    eval_frames: int = 0
    stop_after: int | None = None
    activation_checkpointing: bool = False

    def faults(self) -> list[str]:
        """One line for each value out of range."""
        counts = ("forget_epochs", "max_steps", "max_env_steps", "batch_size", "eval_batch_size", "accumulate",
                  "eval_every", "log_every", "eval_samples", "checkpoint_every", "eval_episodes",
                  "stop_after")  # fmt: skip
        found = _below(self, "loop", ("max_epochs", "eval_frames"), 0) + _below(self, "loop", counts, 1)
        if self.max_flops is None and self.memory_ratio != 1:
            found.append(f"loop.memory_ratio: {self.memory_ratio} has no meaning here (valid: 1; used with max_flops)")
        positive = ("clip_norm", "checkpoint_seconds", "max_flops", "memory_ratio")
        return found + _below(self, "loop", positive, 0, strict=True)

    def epochs(self, kind: str) -> int:
        """Passes over the data of an experience of this kind."""
        return self.max_epochs if kind != "forget" or self.forget_epochs is None else self.forget_epochs


def _below(group: object, prefix: str, keys: tuple[str, ...], least: int, strict: bool = False) -> list[str]:
    """One line for each of `keys` below `least` (or equal to it, where strict); None is always fine."""
    sign = ">" if strict else "≥"
    values = {k: getattr(group, k) for k in keys if getattr(group, k) is not None}
    bad = {k: v for k, v in values.items() if v < least or (strict and v == least)}
    return [f"{prefix}.{k}: {v} is out of range (valid: {sign} {least})" for k, v in bad.items()]


@dataclass
class FabricSettings:
    """Devices and precision, as Lightning Fabric names them.

    Args:
        accelerator: what to compute on; auto takes what is there.
        devices: processes on this node, ≥ 1; each takes one device.
        strategy: ddp, or auto, which is ddp where there are several processes; or fsdp, by which each process holds a
            part of the backbone, its gradients and moments.
        precision: 32-true; bf16-mixed (parameters and memories stay in 32 bits); or bf16-true and 16-true: parameters
            of the backbone in that type, for half the memory, in the runs that have been seen to learn by them.
        num_nodes: machines, ≥ 1.
        threads: CPU threads per process; null leaves torch's choice. Sums are taken in another order with another
            number: figures of longer runs agree within their spread over seeds, not in every digit.
        compile: have torch compile the blocks of a backbone (or all of one that convolves), in seconds to minutes at
            the start: sums are rounded elsewhere, random numbers are the same. Needs a C++ compiler, on a GPU Triton.
    """

    accelerator: Literal["auto", "cpu", "cuda", "gpu", "mps"] = "auto"
    devices: int = 1
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    precision: Literal["32-true", "bf16-mixed", "bf16-true", "16-true"] = "32-true"
    num_nodes: int = 1
    threads: int | None = None
    compile: bool = False

    def faults(self) -> list[str]:
        """One line for each value out of range."""
        return _below(self, "fabric", ("devices", "num_nodes", "threads"), 1)


@dataclass
class StartSettings:
    """Weights to start from.

    Args:
        run: folder of a finished run, or a configuration (file or shipped experiment) that is run first, once for all
            runs under the same `output`; null starts from the backbone's own.
        head: take the head too, not only the backbone; it must have a fixed size (head: linear).
    """

    run: str | None = None
    head: bool = False

    def faults(self) -> list[str]:
        """One line for each value out of range."""
        return [] if self.run or not self.head else ["start.head: true, but start.run names no run"]


LEAST_SHADOWS = 4  # two models for each of both distributions of a sample, which come in pairs


@dataclass
class AuditSettings:
    """What is measured about each request to forget, beside the run: it ends in the same learner with or without.

    Args:
        enabled: score erased, retained and test samples before and after each request, for the erasure report.
        samples: of each of these sets at most, drawn at random, ≥ 1.
        relearn_steps: gradient steps at most in which a copy may learn the erased samples again; 0 does not try.
        relearn_samples: erased samples that it sees, all in each step, ≥ 1.
        relearn_lr: learning rate of these steps, > 0; null is the strategy's.
        tolerance: they count as relearned at 1 − tolerance of the accuracy before the requests, in [0, 1).
        keep_scores: keep the outputs on single samples, with labels and row numbers, when the run is complete; else
            figures over them are kept, once its reports are written. An oracle's run, and one to be compared with an
            oracle's later, needs them.
        shadows: models trained and unlearned for U-LiRA's attack on the last request, when the run is complete; each
            takes as long as the run, 0 or an even number ≥ 4. 16 for a first look, 128 or more for a figure to publish.
        oracle: folder of a finished run on the same stream to compare with, one of `retrain`, say; null has no
            reference (`clplat report RUN_DIR --oracle RUN_DIR` compares later).
    """

    enabled: bool = True
    samples: int = 500
    relearn_steps: int = 50
    relearn_samples: int = 128
    relearn_lr: float | None = None
    tolerance: float = 0.05
    keep_scores: bool = False
    shadows: int = 0
    oracle: str | None = None

    def faults(self) -> list[str]:
        """One line for each value out of range."""
        found = _below(self, "audit", ("samples", "relearn_samples"), 1) + _below(self, "audit", ("relearn_steps",), 0)
        found += _below(self, "audit", ("relearn_lr",), 0, strict=True)
        if self.shadows and (self.shadows < LEAST_SHADOWS or self.shadows % 2):
            found.append(
                f"audit.shadows: {self.shadows} is out of range (valid: 0, or an even number ≥ {LEAST_SHADOWS})"
            )
        if not 0 <= self.tolerance < 1:
            found.append(f"audit.tolerance: {self.tolerance} is out of range (valid: in [0, 1))")
        if self.oracle is not None and not (Path(self.oracle) / "summary.json").is_file():
            found.append(f"audit.oracle: {self.oracle} is not the folder of a finished run (it holds no summary.json)")
        return found


TUNED = "tuned"
"""Tag of a run whose configuration a sweep chose (best.yaml sets it): study, protocol, trials, and what they took."""


@dataclass
class TrackingSettings:
    """MLflow.

    Args:
        enabled: whether to track at all; metrics.jsonl and summary.json are written in any case.
        uri: tracking URI; null is $MLFLOW_TRACKING_URI, or else the store `mlflow.db` beside the run's output folder.
        experiment: MLflow experiment; null is $MLFLOW_EXPERIMENT_NAME, or else `clplat`.
        tags: further tags of the run.
        model: log the learner of the finished run as a model of MLflow's, to be served: two more copies of the last
            checkpoint, with the memory in it. null does so in a store on this machine (SQLite) where the checkpoint has
            at most 64 MiB, unless the run is a sweep's trial.
    """

    enabled: bool = True
    uri: str | None = None
    experiment: str | None = None
    tags: dict[str, str] = field(default_factory=dict)
    model: bool | None = None


@dataclass
class Part:
    """A strategy, stream, backbone, head or merge by name, with its options."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Config:
    """A fully resolved run: what `config.yaml` holds.

    Args:
        name: of the run; its folder under `output`.
        seed: of initialisation, data order and everything drawn, unless a part has a seed of its own.
        output: folder for runs.
        data_root: folder of data sets, and of weights/; null is $CLPLAT_DATA.
        reference: run directory or summary.json whose learning accuracies relative plasticity and intransigence
            compare with (a joint or naive run on the same stream), or whose returns the forward transfer over
            environments does (an agent's run with `strategy.restart`).
        given: objects that were given in Python, by the names that stand for them (`config/given.py`); not written.
    """

    strategy: Part
    stream: Part
    backbone: Part
    head: Part = field(default_factory=lambda: Part("growing"))
    merge: Part = field(default_factory=lambda: Part("none"))
    loop: LoopSettings = field(default_factory=LoopSettings)
    fabric: FabricSettings = field(default_factory=FabricSettings)
    start: StartSettings = field(default_factory=StartSettings)
    audit: AuditSettings = field(default_factory=AuditSettings)
    tracking: TrackingSettings = field(default_factory=TrackingSettings)
    name: str | None = None
    seed: int = 0
    output: str = "runs"
    data_root: str | None = None
    reference: str | None = None
    given: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict in the layout of config.yaml: a part is {name: ..., option: ...}."""
        plain = asdict(replace(self, given={}))
        del plain["given"]
        for key in ("strategy", "stream", "backbone", "head", "merge"):
            part = plain[key]
            plain[key] = {"name": part["name"], **part["options"]}
        return plain


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys joined by dots."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found
