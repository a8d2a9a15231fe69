"""Every strategy that learns or forgets on models whose classes are words: CLIP, a decoder, an encoder-decoder; that
they run on an encoder of texts with a head, too.

A strategy is covered when it is discovered; one that adapts to test data or acts is not asked.
"""

import math

import families
import pytest
import torch
import torch.nn.functional as F
from rings import SECOND_RING

from clplat.components.fisher import mean_squared_gradient
from clplat.components.losses import Losses
from clplat.components.per_parameter import trainable
from clplat.config import discovery
from clplat.config.settings import FabricSettings
from clplat.errors import UserError
from clplat.metrics import summarize
from clplat.run.build import seed_everything
from clplat.run.launch import make_fabric
from clplat.stream import Kind
from clplat.testing.subject import State, Subject

HEADED = {
    "coact",
    "coda_prompt",
    "dualprompt",
    "l2m",
    "l2p",
    "slca",
}  # they learn beside a head, which of these models the encoder alone has
TOWERS = {"vr_lwf"}  # they ask for a text tower beside one of images
PATCHES = {"self_distillation_fpt"}  # they hide patches of images, which none of these models reads alone
KNOWN = 22  # strategies when this was last looked at; there can only be more
ENTRIES = {n: e for n, e in discovery.entries("strategies").items() if e.qualname.startswith("clplat.")}
NAMES = sorted(n for n, e in ENTRIES.items() if set(e.kinds) <= {"learn", "forget"})
COLUMNS = {"clip": "clip", "llama": "decoder", "t5": "encoder_decoder", "encoder": "text_encoder"}  # of the matrix
FORGETTING = [n for n in NAMES if "forget" in discovery.entries("strategies")[n].kinds]
TEXT = {"llama": "llama", "t5": "t5"}
WRITING = {n for n in NAMES if Subject(n).cls.needs_text}


def takes(name, family):
    if name in TOWERS:
        return family == "clip"
    if name in WRITING:
        return family in TEXT
    return name not in PATCHES and (family == "encoder" or name not in HEADED)


PAIRS = [(n, f) for n in NAMES for f in families.ALL if takes(n, f)]


def make(name, family, stream, **options):
    subject = Subject(name)
    seed_everything(0)
    model = families.model(family, stream, **options)
    return subject, subject.cls(model=model, **subject.options())


def ran(name, family, *, stream=None, precision="32-true", **options):
    """A strategy after its run, and the runner."""
    if stream is None and name in WRITING and family in TEXT:
        stream = families.texts(free=True)
    if stream is None:
        stream = families.ALL[family](0 if name in FORGETTING else None)
    subject, strategy = make(name, family, stream, **options)
    fabric = make_fabric(FabricSettings(accelerator="cpu", precision=precision))
    trial = subject.trial(strategy, stream, fabric=fabric)
    trial.run()
    return strategy, trial


def check(strategy, trial):
    """Finite outputs and measurements, a state that can be saved, and scores for every experience that was tested."""
    State.of(strategy)
    accuracy = [value for row in trial.record.matrix for value in row]
    assert accuracy
    assert all(value is None or 0 <= value <= 1 for value in accuracy)
    assert all(math.isfinite(v) for v in strategy.measurements().values())
    assert summarize(trial.record)[0]
    for name, value in strategy.state_dict().items():
        unknown = name == "memory.stored.logits"  # of classes met later, in a memory of logits
        if isinstance(value, torch.Tensor) and value.is_floating_point() and not unknown:
            assert not value.isnan().any()


def test_none_is_left_out():
    assert len(NAMES) >= KNOWN
    assert {"hnet", "dp_hnet", "gs_lora", "gs_lora_pp", "ewc"} <= set(NAMES)


@pytest.mark.support
@pytest.mark.parametrize("family", families.STREAMS)
@pytest.mark.parametrize("name", sorted(HEADED))
def test_what_needs_a_head_says_so(name, family, seen):
    with pytest.raises(UserError, match=r"answers in words, and .* head") as raised:
        make(name, family, families.ALL[family](None))
    seen(name, COLUMNS[family], raised.value.faults[0])


@pytest.mark.support
@pytest.mark.parametrize(
    ("name", "family"), [(n, f) for n in sorted(TOWERS | PATCHES) for f in families.ALL if not takes(n, f)]
)
def test_what_needs_a_text_tower_or_patches_says_so(name, family, seen):
    lacks = "text tower" if name in TOWERS else "patches that can be hidden"
    with pytest.raises(UserError, match=f"backbone: has no {lacks}") as raised:
        make(name, family, families.ALL[family](None))
    seen(name, COLUMNS[family], raised.value.faults[0])


@pytest.mark.support
@pytest.mark.parametrize("family", families.ALL)
@pytest.mark.parametrize("name", sorted(WRITING))
def test_what_lets_the_model_write_refuses_classes(name, family, seen):
    with pytest.raises(UserError, match="those of this stream are no free text") as raised:
        ran(name, family, stream=families.ALL[family]())
    (fault,) = raised.value.faults
    if not takes(name, family):
        seen(name, COLUMNS[family], fault)


@pytest.mark.support
@pytest.mark.filterwarnings("ignore:strategy.*the answers of:UserWarning")  # of S3FT
@pytest.mark.parametrize(
    ("name", "family"), [pytest.param(n, f, marks=[pytest.mark.slow] * (n in SECOND_RING)) for n, f in PAIRS]
)
def test_runs(name, family, seen):
    check(*ran(name, family))
    if family != "encoder":  # on which the suite itself is run
        seen(name, COLUMNS[family])


@pytest.mark.support
@pytest.mark.filterwarnings("ignore:.*augmentations cut off:UserWarning")
@pytest.mark.parametrize("family", families.ALL)
@pytest.mark.parametrize("name", sorted(set(ENTRIES) - set(NAMES)))
def test_what_adapts_or_acts_runs_or_says_in_a_line_why_not(name, family, seen):
    kinds = Subject(name).cls.kinds
    stream = families.adapting(family, Kind.LEARN in kinds) if Kind.ADAPT in kinds else families.ALL[family]()
    why = ""
    try:
        _, strategy = make(name, family, stream, depth=2)
        if faults := strategy.faults([e.seen() for e in stream], False):
            raise UserError(*faults)
        check(*ran(name, family, stream=stream, depth=2))
    except UserError as error:  # anything else is a traceback
        (why,) = error.faults
    seen(name, COLUMNS[family], why)


@pytest.mark.filterwarnings("ignore:strategy.*the answers of:UserWarning")  # of S3FT
@pytest.mark.slow
@pytest.mark.parametrize(("name", "family"), PAIRS[:: len(families.ALL) - 1])  # one or two of each, families in turn
def test_runs_in_mixed_precision(name, family):
    check(*ran(name, family, precision="bf16-mixed"))


NEED_CLASSES = [n for n in NAMES if Subject(n).cls.needs_classes]


@pytest.mark.filterwarnings("ignore:strategy.*the answers of:UserWarning")  # of S3FT
@pytest.mark.slow
@pytest.mark.parametrize("family", TEXT)
@pytest.mark.parametrize("name", sorted({*NAMES} - {*NEED_CLASSES} - PATCHES))
def test_free_text_is_learned_and_forgotten(name, family):
    forget = 0 if name in FORGETTING else None
    check(*ran(name, family, stream=families.texts(forget, free=True)))


@pytest.mark.parametrize("name", sorted(set(NEED_CLASSES) - HEADED - TOWERS))
def test_what_needs_classes_refuses_free_text(name):
    with pytest.raises(UserError, match="needs classes, but the answers of this stream are free text"):
        ran(name, "llama", stream=families.texts(0 if name in FORGETTING else None, free=True))


# --- hypernetworks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", families.STREAMS)
@pytest.mark.parametrize("name", ["hnet", "dp_hnet"])
def test_a_hypernetwork_starts_at_the_model_that_was_given(name, family):
    stream = families.STREAMS[family]()
    seed_everything(0)
    plain = families.model(family, stream).eval()
    _, strategy = make(name, family, stream)
    strategy.grow(stream[0])
    strategy.eval()
    x, y = stream[0].train.all()
    x = stream.prepare(x, False)
    plain.grow(stream[0])
    torch.testing.assert_close(strategy.losses(x, y), plain.losses(x, y))
    torch.testing.assert_close(strategy.predict(x)[:, :2], plain(x)[:, :2])
    assert strategy.predict(x)[:, 2:].isneginf().all()  # of a task that is still to come
    assert strategy.model.target.slices[0].base  # adapters, and nothing else
    assert all(s.base for s in strategy.model.target.slices)


@pytest.mark.parametrize("family", TEXT)
def test_a_hypernetwork_writes_with_the_weights_of_the_task_that_is_surest(family):
    stream = families.texts(free=True)
    strategy, _ = ran("hnet", family, stream=stream)
    strategy.eval()
    x = stream[0].test.all()[0]
    model, written = strategy.model, strategy.predict(x)
    each = torch.stack([model.of_slot(x, s) for s in range(2)])
    entropy = []
    for slot in range(2):
        logs = model.first_token(x, slot).log_softmax(1)
        entropy.append(-(logs.exp() * logs).sum(1))
    chosen = torch.stack(entropy).argmin(0)
    assert torch.equal(written, each[chosen, torch.arange(len(x))])
    assert (strategy.predict(x, 5) == -1).all()  # a task not met


def test_a_hypernetwork_leaves_weights_in_their_own_type():
    strategy, trial = ran("hnet", "llama", dtype="bfloat16")
    check(strategy, trial)
    weights = strategy.model.target.weights(strategy.model.omega(0))
    assert {w.dtype for w in weights.values()} == {torch.bfloat16}


# --- the importance of weights ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("family", families.STREAMS)
def test_squared_gradients_by_a_loop(family, group):
    """CLIP and the decoder go through vmap, the encoder-decoder, which looks at its numbers, does not."""
    stream = families.STREAMS[family]()
    model = families.model(family, stream).eval()
    model.grow(stream[0])
    x, y = stream[0].train.all()
    x, y = stream.prepare(x, False)[:5], y[:5]
    parameters = {f"model.{n}": p.detach() for n, p in trainable(model).items()}
    scored = Losses(model)
    found = mean_squared_gradient(
        lambda values, a, b: torch.func.functional_call(scored, values, (a, b)).mean(), parameters, x, y, group
    )
    total = dict.fromkeys(parameters, 0.0)
    parts = list(zip(x.split(group), y.split(group), strict=True))
    for a, b in parts:
        gradients = torch.autograd.grad(model.losses(a, b).mean(), list(trainable(model).values()), allow_unused=True)
        for name, g in zip(parameters, gradients, strict=True):
            total[name] = total[name] + (0.0 if g is None else g.square() / len(parts))
    for name, value in found.items():
        torch.testing.assert_close(value, torch.as_tensor(total[name]).expand_as(value), rtol=1e-3, atol=1e-5)


# --- requests ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("named", [False, True], ids=["all answers", "answers named in the prompt"])
@pytest.mark.parametrize("family", families.STREAMS)
@pytest.mark.parametrize("name", ["gs_lora", "gs_lora_pp", "gradient_ascent"])
def test_the_bound_is_that_of_the_answers_to_choose_from(name, family, named):
    if family == "clip" and named:
        pytest.skip("images name no classes")
    stream = families.texts(0, named=named) if family in TEXT else families.pictures(0)
    count = 2 if named else families.CLASSES
    _, strategy = make(name, family, stream)
    if name != "gradient_ascent":
        strategy.sparsity, strategy.forgetting = 0.0, [1.0]
        strategy.prototype_forgetting = 0.0
    request = stream[2]
    strategy.grow(stream[0])
    strategy.grow(request)
    strategy.begin(request)
    strategy.training_data(request)
    strategy.eval()
    x, y = request.train.all()
    x = stream.prepare(x, False)
    strategy.raw, strategy.global_batch = x, len(x)
    loss = strategy.forget_step((x, y), 0)
    each = strategy.model.losses(x, y)
    if family == "clip":  # all classes compete in a request, not only the one to erase
        torch.testing.assert_close(each, F.cross_entropy(strategy.model(x), y, reduction="none"))
    bound = 2 * math.log(count)
    expected = -each.clamp(max=bound).mean() if name == "gradient_ascent" else (bound - each.mean()).relu()
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("family", families.STREAMS)
def test_no_prototype_outlives_its_request(family):
    stream = families.STREAMS[family](0)
    subject, strategy = make("gs_lora_pp", family, stream)
    seen = {}

    class Noting(type(strategy)):
        def begin(self, experience):
            super().begin(experience)
            seen["prototypes"] = self.prototypes.clone()

    strategy.__class__ = Noting
    subject.trial(strategy, stream).run()
    prototypes = seen["prototypes"]
    assert prototypes.shape == (families.CLASSES, strategy.model.backbone.embed_dim)
    assert prototypes.any(1).all()
    assert not strategy.prototypes.any()
    for name, value in strategy.state_dict().items():  # nor a copy of it anywhere
        if isinstance(value, torch.Tensor) and value.shape[-1:] == prototypes.shape[-1:]:
            rows = value.reshape(-1, value.shape[-1]).float()
            assert not (rows - prototypes[0]).abs().amax(1).lt(1e-6).any(), name


def test_all_classes_compete_in_a_request():
    stream = families.pictures(0)
    model = families.model("clip", stream)
    model.grow(stream[0])
    assert model.rivals == (0, 1)
    model.grow(stream[2])
    assert stream[2].kind is Kind.FORGET
    assert model.rivals == (0, 1, 2, 3)
