"""What a strategy is: one LightningModule with a hook for each kind of experience it declares.

Shapes: B samples of a batch, C classes, D features.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clplat.errors import UserError
from clplat.lightning import LightningModule
from clplat.stream import Data, Experience, Kind
from clplat.writing import Writing

# The hooks a subclass writes for each kind; the loop calls them, and refuses a kind whose hook is missing.
HOOKS: dict[Kind, tuple[str, ...]] = {
    Kind.LEARN: ("training_step",),
    Kind.FORGET: ("forget_step",),
    Kind.ADAPT: ("adapt_step",),
    Kind.INTERACT: ("act", "observe", "training_step"),
}
LIFECYCLE = (
    "faults",
    "grow",
    "begin",
    "training_data",
    "after_step",
    "end",
    "predict",
    "readout",
    "configure_optimizers",
    "measurements",
    "handover",
    "probe",
)


class Strategy(LightningModule):
    """Base of all strategies. Abstract: plain fine-tuning is a strategy of its own (`naive`).

    A subclass sets `kinds` and `paper`, writes the hook of each kind, and keeps all state that matters between
    steps in parameters, buffers or `get_extra_state` (tensors and plain numbers), so that a checkpoint holds it.

        training_step(batch, batch_idx) -> loss     learn: batch is (inputs (B, ...), labels (B,)); interact: None
        forget_step(batch, batch_idx) -> loss       forget: the samples to erase
        adapt_step(inputs) -> predictions           adapt: before this batch changes anything; or (predictions, loss)
        act(observation, explore) -> action         interact
        observe(transition) -> int                  interact: store it; how many training steps to take now
        handover(experience, score, chance)         interact, may be left out: before the first step in an environment,
                                                    with the mean return there and what random actions reach: the
                                                    stream's figure, or their mean plus two standard errors
                                                    (None where actions are no vectors); returns lines to warn with
        probe(transitions) -> {"q", "td_error"}     interact, may be left out: both (n,), to measure, not to learn from

    A hook may return None instead of a loss when it needs no gradient step. Losses are means over the batch: under
    DDP gradients are averaged over processes; use `self.mean` where a batch may be ragged.

    Args:
        model: the network; `model(inputs, task)` gives logits (B, C), `model.features(inputs)` features (B, D).
        optimizer: sgd, adam or adamw; made anew for each experience.
        lr: learning rate, > 0.
        momentum: of sgd, in [0, 1).
        weight_decay: ≥ 0.
        schedule: of the learning rate within an experience; cosine ends at 0.
        warmup: share of an experience's steps over which the rate rises linearly from 0, in [0, 1].
    """

    kinds: ClassVar[frozenset[Kind]]
    paper: ClassVar[str]
    # Batches hold samples of other tasks, or a teacher scores them. With `head: taskwise` it tells the task of each:
    # `self.losses(x, y)` does, and `self.model(x, tasks_of(self.model, y))`. On `clip` all classes met compete then.
    replays: ClassVar[bool] = False
    # Whether what it keeps grows with the samples seen (upper bounds that store all data); the conformance suite
    # holds all others to a bound.
    unbounded_memory: ClassVar[bool] = False
    # It takes all samples of an experience at once (`Data.all`), so that a run on data that are not in memory is
    # refused. One whose memory is unbounded is, too.
    reads_whole: ClassVar[bool] = False
    # For the erasure report: "exact: ..." or "approximate: ...", what a request changes and what it leaves as it was;
    # and which data it reads. Without `data_access` that is told from `unbounded_memory` and `replays`.
    erasure: ClassVar[str] = "approximate: no guarantee beyond what is measured"
    data_access: ClassVar[str] = ""
    # `model.features` never changes, and so is asked for each sample's features once: evaluation keeps those of the
    # test sets and calls `readout` alone, and inputs are prepared without augmentation in training too.
    frozen_features: ClassVar[bool] = False
    # A `predict` of its own is the model's under other weights, so that log-likelihoods of texts are asked of it, too.
    predicts_as_model: ClassVar[bool] = False
    # Samples of an evaluation batch where a prediction depends on the others in its batch, as with batch statistics;
    # None: it does not, and `loop.eval_batch_size`, a setting for speed, decides.
    evaluation_batch: int | None = None
    # Its method is defined by classes, so that free text can't be learned by it.
    needs_classes: ClassVar[bool] = False
    # It lets the model write answers to training prompts, so that the stream's must be free text (`self.writing`).
    needs_text: ClassVar[bool] = False
    # It can't be split over processes: a run in several is refused, and `clplat check` does not ask for it.
    one_process: ClassVar[bool] = False
    # What a sweep searches unless it is told: option → (low, high), (low, high, "log") or a list of choices, the
    # default among them, in literals; None takes a base's away. What trades space or time for accuracy is left out.
    searched: ClassVar[dict[str, Any]] = {"lr": (1e-3, 1.0, "log")}
    # For what `merge:` names, which changes trained weights when an experience ends: why that has no meaning for it
    # (empty: it has one); and whether what it trains are factors of a change, which a scaled change has not.
    unmergeable: ClassVar[str] = ""
    factored: ClassVar[bool] = False
    # Its steps train several networks, put into the model in turn, so that an average over steps is of none of them.
    in_turn: ClassVar[bool] = False
    # Why it can't learn by weights of which each process holds a part (fabric.strategy fsdp); empty where a test has
    # seen it end where one process does. What a subclass adds has to be seen again: "" is not inherited, a reason is.
    unshardable: ClassVar[str] = 'it does not say that it was seen to (unshardable = "")'
    # Seen to learn by weights in half precision (fabric.precision bf16-true), and the same where passes are computed
    # again (loop.activation_checkpointing), which meet the module as it was before. Not inherited.
    plain_passes: ClassVar[bool] = False
    # What of its loss is of a batch as a whole, so that accumulated batches are another step than one of their size;
    # empty where it is a mean over samples.
    whole_batch: str = ""
    # The optimizer's state goes on from one interact experience to the next, and comes along from a start run.
    carries_optimizer: ClassVar[bool] = False

    # Lines that the user is told before the run: what of the choices made has no part, or another one, in this method.
    notes: Sequence[str] = ()

    # Set by the runner: inputs of the current batch as the stream holds them (what a memory should keep), their rows
    # (B,) in the data set, the stream's `prepare`, the number of samples of the batch over all processes; and the
    # stream's `writing`, where it has one.
    raw: Tensor
    rows: Tensor
    global_batch: int = 0
    world_size: int = 1
    rank: int = 0
    global_step_count: int = 0
    _prepare: Callable[[Tensor, bool], Tensor] | None = None
    writing: Writing

    # Hooks that a subclass may write; declared for type checkers only, nothing is inherited.
    forget_step: Callable[[Any, int], Tensor | None]
    adapt_step: Callable[[Tensor], Tensor | tuple[Tensor, Tensor]]
    act: Callable[[Any, bool], Any]
    observe: Callable[[Any], int]
    handover: Callable[[Experience, float, float | None], list[str]]
    probe: Callable[[Any], dict[str, Tensor]]

    def __init__(
        self,
        *,
        model: nn.Module,
        optimizer: Literal["sgd", "adam", "adamw"] = "sgd",
        lr: float = 0.1,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        schedule: Literal["constant", "cosine"] = "constant",
        warmup: float = 0.0,
    ) -> None:
        super().__init__()
        require("lr", lr, lr > 0, "> 0")
        require("momentum", momentum, 0 <= momentum < 1, "in [0, 1)")
        require("weight_decay", weight_decay, weight_decay >= 0, "≥ 0")
        require("warmup", warmup, 0 <= warmup <= 1, "in [0, 1]")
        self.model = model
        if hasattr(model, "replayed"):  # classes named in words: those met so far compete
            model.replayed = self.replays  # type: ignore[assignment]
        self.optimizer_name, self.lr, self.momentum, self.weight_decay = optimizer, lr, momentum, weight_decay
        self.schedule, self.warmup = schedule, warmup

    # --- life of an experience, in the order of a run -------------------------------------------------------------

    def grow(self, experience: Experience) -> None:
        """Add structure (head rows, adapters, copies). Uses no data; replayed on resume before weights are loaded."""
        grow = getattr(self.model, "grow", None)
        if grow is not None:
            grow(experience)

    def begin(self, experience: Experience) -> None:
        """Before the first step, with the data at hand: fill teachers, importance, statistics."""

    def training_data(self, experience: Experience) -> Data:
        """What the epochs of a learn or forget experience run over; asked for after `begin`, and again on resume."""
        assert experience.train is not None
        return experience.train

    def after_step(self) -> None:
        """After each optimizer step, once however many batches were accumulated: EMA, projections, targets."""

    def end(self, experience: Experience) -> None:
        """After the last step: consolidate."""

    def predict(self, inputs: Tensor, task: int | None = None) -> Tensor:
        """Logits (B, C) for prepared inputs (B, ...); `task` only where the stream declares it known."""
        if self.frozen_features:
            return self.readout(self.model.features(inputs), task)  # type: ignore[operator]
        return getattr(self.model, "predict", self.model)(inputs, task)

    def readout(self, features: Tensor, task: int | None = None) -> Tensor:
        """Logits (B, C) for features (B, D), where `frozen_features` is declared."""
        head: Any = self.model.head
        return head.predict(features, task)

    def predicting(self) -> AbstractContextManager[None]:
        """The model with the weights that `predict` uses, where these are not its own: averages, slow copies."""
        return nullcontext()

    def measurements(self) -> dict[str, float]:
        """Numbers of the strategy's own to log after each experience, as `strategy/<name>`."""
        return {}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer of one experience over what is trainable now (empty for gradient-free learners)."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        if self.optimizer_name == "sgd":
            return torch.optim.SGD(parameters, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)
        cls = torch.optim.Adam if self.optimizer_name == "adam" else torch.optim.AdamW
        return cls(parameters, lr=self.lr, weight_decay=self.weight_decay)

    def before_start(self, weights: dict[str, Tensor]) -> None:
        """What the model's state was before a start run's weights were loaded into it; called once, after building.

        For a strategy that goes back to its beginning: the start run may have seen what is to be erased.
        """

    def faults(self, experiences: Sequence[Experience], started: bool) -> list[str]:
        """Why it can't learn from these, one line each; asked before anything runs.

        Args:
            started: whether a start run comes before them (which, in a dry run, may not have been made).
        """
        return []

    # --- services -------------------------------------------------------------------------------------------------

    def prepare(self, raw: Tensor) -> Tensor:
        """Stored inputs (as in `self.raw`, or a memory) to model inputs, augmented as the stream says in training."""
        augmented = self.training and not self.frozen_features
        return raw if self._prepare is None else self._prepare(raw, augmented)

    def losses(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Loss (B,) of each sample of prepared inputs (B, ...), as the model defines it (see `losses` in this module).

        Cross-entropy for a classifier, the answer's tokens for a language model. Labels are opaque rows: (B,) class
        ids, or (B, A) token ids where answers are free text.
        """
        return losses(self.model, inputs, labels)

    def mean_loss(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """`self.mean(self.losses(inputs, labels))`, cross-entropy's mean in one operation where that is the same."""
        cls = type(self)
        if self._even and cls.losses is Strategy.losses and cls.mean is Strategy.mean:
            return losses(self.model, inputs, labels, mean=True)
        return self.mean(self.losses(inputs, labels))

    @property
    def _even(self) -> bool:
        """Whether every process holds as many samples of the batch."""
        return self.world_size == 1 or self.global_batch % self.world_size == 0

    def mean(self, losses: Tensor) -> Tensor:
        """Mean of per-sample losses (b,) over the samples of all processes.

        DDP averages gradients with equal weights, which is wrong for a last batch that does not divide evenly; here
        each process counts by what it holds. One process: the plain mean.
        """
        if self._even:
            return losses.mean()
        total = torch.tensor(float(losses.numel()), device=losses.device)
        torch.distributed.all_reduce(total)
        return losses.sum() * (self.world_size / total)


def require(name: str, value: object, holds: bool, valid: str) -> None:
    """Refuse a hyper-parameter out of range, naming it, its value and the valid range."""
    if not holds:
        raise UserError(f"strategy.{name}: {value!r} is out of range (valid: {valid})")


def why_not_sharded(cls: type[Strategy]) -> str:
    """Why a strategy is refused under `fabric.strategy: fsdp`; empty where it is not."""
    said: str = next(c.__dict__["unshardable"] for c in cls.__mro__ if "unshardable" in c.__dict__)
    return said if said or "unshardable" in cls.__dict__ else Strategy.unshardable


def check_hooks(cls: type[Strategy]) -> list[str]:
    """Faults of a strategy class, one line each: a kind without its hook, a misspelt hook, missing facts.

    A method that is public, not Lightning's and not one of the hooks is taken for a misspelt hook: helpers carry an
    underscore.
    """
    import difflib

    name, faults = cls.__name__, []
    if not isinstance(getattr(cls, "kinds", None), frozenset) or not cls.kinds:
        return [f"{name}.kinds: must be a non-empty frozenset of Kind"]
    if not isinstance(getattr(cls, "paper", None), str):
        faults.append(f"{name}.paper: must be a string (an arXiv id, a DOI, or what the method is)")
    hooks = {h for kind in Kind for h in HOOKS[kind]}
    own = _own_methods(cls)
    for kind in sorted(cls.kinds):
        faults += [f"{name}.kinds: declares '{kind}' but does not write {h}()" for h in HOOKS[kind] if h not in own]
    declared = {h for kind in cls.kinds for h in HOOKS[kind]}
    faults += [f"{name}.{h}: written, but no kind that calls it is declared" for h in sorted((own & hooks) - declared)]
    known = hooks | set(LIFECYCLE) | {"forward"}
    for method in sorted(own - known):
        if method.startswith("_") or hasattr(Strategy, method):
            continue
        near = difflib.get_close_matches(method, sorted(known), n=1)
        hint = f"did you mean {near[0]}?" if near else "a helper's name starts with an underscore"
        faults.append(f"{name}.{method}: is no hook ({hint})")
    return faults


def _own_methods(cls: type[Strategy]) -> set[str]:
    """Names of functions written between `cls` and `Strategy`."""
    classes = [c for c in cls.__mro__ if issubclass(c, Strategy) and c is not Strategy]
    return {n for c in classes for n, v in vars(c).items() if inspect.isfunction(v)}


def check_kinds(cls: type[Strategy], kinds: list[Kind]) -> list[str]:
    """Faults of running a strategy on a stream of these kinds."""
    missing = sorted(set(kinds) - cls.kinds)
    can = ", ".join(sorted(cls.kinds))
    return [
        f"strategy: {cls.__name__} does not handle kind '{k}', which the stream has (it handles: {can})"
        for k in missing
    ]


def losses(model: nn.Module, inputs: Tensor, labels: Tensor, task: int | None = None, mean: bool = False) -> Tensor:
    """Loss (B,) of each sample: the model's own `losses(inputs, labels)` where it has one, else cross-entropy.

    Args:
        inputs: (B, ...) prepared.
        labels: (B,) class ids; or (B, A) token ids where a stream's answers are free text.
        task: of the samples, for a model whose head asks for it.
        mean: whether to give their mean () instead.
    """
    own: Any = getattr(model, "losses", None)
    if own is not None:
        return own(inputs, labels).mean() if mean else own(inputs, labels)
    of: Any = task if task is not None else tasks_of(model, labels)
    logits = model(inputs) if of is None else model(inputs, of)
    return F.cross_entropy(logits, labels, reduction="mean" if mean else "none")


def tasks_of(model: nn.Module, labels: Tensor) -> Tensor | None:
    """The task (B,) of samples with labels (B,), where the model's head has rows for each task; else None."""
    tell: Any = getattr(model, "tasks_of", None)
    return None if tell is None else tell(labels)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode, after which every sub-module is back in the mode it was in."""
    training = [m for m in module.modules() if m.training]
    module.eval()
    try:
        yield
    finally:
        for m in training:
            m.training = True
