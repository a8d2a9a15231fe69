"""Every strategy that learns, forgets or adapts goes through the suite on small networks of timm, or says why not."""

from functools import partial

import pytest
from rings import ELSEWHERE
from supporting import RECORDING

from clplat.backbones.timm import timm
from clplat.config import discovery
from clplat.config.settings import Config, Part
from clplat.errors import UserError
from clplat.run.build import check_stream
from clplat.stream import Kind
from clplat.testing import CHECKS, Subject, judge
from clplat.testing.checks_of_state import resume
from clplat.testing.streams import TinyStream

BACKBONES = {
    "convolutional": lambda shape: timm(shape, "test_efficientnet"),
    "transformer": lambda shape: timm(shape, "test_vit", image_size=16),
}
CONVOLUTIONS = "its layers are convolutions, and linear ones alone can be adapted"
TOWERS = {"vr_lwf": "has no text tower"}
PATCHES = {"self_distillation_fpt": "has no patches that can be hidden"}
REFUSED = {  # by kind of network: strategies, and the cause that they give
    "convolutional": dict.fromkeys(
        {"aper", "coda_prompt", "corda", "dualprompt", "eva", "gs_lora", "gs_lora_pp", "ilora", "l2m", "l2p", "lift"}
        | {"inflora", "locft_bf", "lora", "loramoe", "moram", "olora", "rmu", "sd_lora", "ease", "svd_orthogonal"}
        | {"coact"},
        CONVOLUTIONS,
    )
    | TOWERS
    | PATCHES,
    "transformer": {"bn_adapt": "batch normalisation"} | TOWERS,
}
# Begun anew, it has seen too few batches for the running statistics of twelve layers: classes stay near chance.
NOT_ASKED = {("retrain", "convolutional"): {"erasure"}}
midway = partial(resume, once=True)  # every other place to stop is tried on the suite's own networks
ENTRIES = {n: e for n, e in discovery.entries("strategies").items() if e.qualname.startswith("clplat.")}
WRITING = [name for name in ENTRIES if Subject(name).cls.needs_text]
NAMES = [name for name, e in ENTRIES.items() if set(e.kinds) != {"interact"} and name not in WRITING]
BOTH = {"acu", "cotta", "er", "ewc", "hnet", "tent"}
ACTING = [name for name in ENTRIES if name not in (*NAMES, *WRITING)]


def asked():
    """Strategies by kind of network; most on one that they take, in turn, but for the record: the part has its time."""
    for place, name in enumerate(NAMES):
        kinds = [kind for kind, refused in REFUSED.items() if name not in refused]
        if name not in BOTH and kinds and not RECORDING:
            kinds = [kinds[place % len(kinds)]]
        yield from ((name, kind) for kind in kinds)


class Small(Subject):
    """With steps that networks of a dozen layers take without leaving the numbers there are, EWC's penalty included."""

    def options(self, processes=1):
        known = super().options(processes)
        return (
            known | {"lr": 0.002 if self.name in ("ewc", "dp_hnet", "hnet", "joint") else 0.01}
            if "lr" in known
            else known
        )


def subject(name, kind):
    found = Small(name)
    found.backbone = BACKBONES[kind]
    if name in PATCHES and kind == "transformer":  # of which it asks for more than one
        found.backbone = partial(timm, model="test_vit", image_size=32)
    return found


@pytest.mark.support
@pytest.mark.parametrize("kind", BACKBONES)
@pytest.mark.parametrize("name", NAMES)
def test_is_built_on_timm_or_says_in_a_line_why_not(name, kind, seen):
    mine, cause = subject(name, kind), REFUSED[kind].get(name)
    if cause is None:
        mine.build(TinyStream(mine.cls.kinds))
        return
    with pytest.raises(UserError, match=cause) as raised:
        mine.build(TinyStream(mine.cls.kinds))
    assert len(raised.value.faults) == 1
    seen(name, kind, raised.value.faults[0])


@pytest.mark.support
@pytest.mark.parametrize("kind", BACKBONES)
@pytest.mark.parametrize("name", ACTING)
def test_what_acts_has_networks_of_its_own(name, kind, seen):
    mine = subject(name, kind)
    with pytest.raises(UserError) as raised:
        mine.build(TinyStream(mine.cls.kinds))
    seen(name, kind, raised.value.faults[0])


@pytest.mark.support
@pytest.mark.parametrize("kind", BACKBONES)
@pytest.mark.parametrize("name", WRITING)
def test_what_lets_the_model_write_refuses_images(name, kind, seen):
    (fault,) = check_stream(Config(*[Part("tiny")] * 3), Subject(name).cls, TinyStream({Kind.LEARN}))
    seen(name, kind, fault)


@pytest.mark.slow
@pytest.mark.support
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("name", "kind"), list(asked()))
def test_conforms_on_timm(name, kind, seen):
    mine = subject(name, kind)
    checks = [check for check in CHECKS if check not in ELSEWHERE | NOT_ASKED.get((name, kind), set())]
    results = [judge(mine, check, midway if check == "resume" else None) for check in checks]
    assert [r for r in results if r.status == "failed"] == []
    seen(name, kind)
