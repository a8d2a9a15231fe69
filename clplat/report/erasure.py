"""The erasure report: one page for whoever has to answer for what a model was asked to forget.

`erasure.html` and `erasure.json` in a run's folder: what was asked and done, when, the evidence, what an exact erasure
covers and what it does not. The page needs no network and no script to be read; it prints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from clplat.files import to_json, write_atomic
from clplat.report.erasure_parts import (
    evidence_tables,
    findings,
    ledger_table,
    memorisation_table,
    refused_table,
    requests_table,
    traces_table,
)
from clplat.report.evidence import evidence
from clplat.report.naming import short_name
from clplat.report.numbers import show
from clplat.report.page import document
from clplat.report.parts import chip
from clplat.report.spec import Figure, Lines, Series
from clplat.report.svg import NARROW, WIDE, group_class, marker, render

_MOST_LINES = 8
_NOTES = """
<p><b>The three models.</b> <i>Before</i> is the model that an unbroken sequence of requests was made to. <i>After</i>
is the model that the request has left. <i>Retrained</i> is the model of the reference run at the same request, trained
without the erased data; where no reference run was given, there is none, and no number stands in its place. The aim is
to be like the retrained model, not to reach an end of the scale: of single samples it too names most right. Distances
between probabilities mean little where it was trained by another recipe; compare accuracies then.</p>
<p><b>Accuracy</b> is the share of samples named right: of the erased training samples, of the held-out samples that go
with them, and of what was learned and kept. Numbers are over the samples scored, drawn at random.</p>
<p><b>Told from unseen data.</b> The chance that an erased sample has a lower loss than one the model never saw: 0.5 is
guessing, 1 gives every erased sample away. It is the attack of an outsider who knows the model's scores. An attack made
for each single sample with models trained for the purpose (U-LiRA) is stronger; it is here where the run was asked for
it (<code>audit.shadows</code>), with the number of these models: few of them make it weaker than it can be.</p>
<p><b>By this model alone.</b> Which samples were erased, asked of somebody who has the model after the request and not
the one before: a rule on its outputs is learned on half of the candidates, whose truth it is told, and tested on the
other half. Compare with the retrained model, which never had the erased samples and so treats them as unseen. An
interval above 0.5 shows that the request can be found out; one that holds 0.5 does not show that it can't: the rule
sees outputs only, and an attacker with weights or gradients may do better. Where a whole class goes, that alone tells.
</p>
<p><b>Learned again.</b> Gradient steps, on copies of the weights, until the erased samples are named about as well as
before. Far fewer steps than the retrained model needs mean that knowledge was left; their ratio is the anamnesis index,
1 at best. A number after “&gt;” was not reached within the steps allowed.</p>
<p><b>Features.</b> A new linear classifier on the model's inner features, tested on erased held-out samples. High
numbers mean that the features still tell them apart, whatever the model says. That may hold for a retrained model too.
</p>
<p><b>What this report is.</b> Measurements of one model in one run folder. Tests of this kind can show that an erasure
failed; that they show nothing is no proof that it succeeded. Such proof is the mathematics of an exact method, within
what it covers. What in the run's folder still derives from erased samples is listed above.</p>
"""


def write_erasure(run_dir: Path | str, oracle_dir: Path | str | None = None) -> Path | None:
    """Write erasure.json and erasure.html into the run's folder; the page's path, or None without any request done.

    Args:
        run_dir: of a run of any status.
        oracle_dir: of a run on the same stream to compare with, request by request.

    Raises:
        UserError: a folder that is no run's, or an oracle of another stream.
    """
    run_dir = Path(run_dir)
    found = evidence(run_dir, oracle_dir)
    if found is None:
        return None
    write_atomic(run_dir / "erasure.json", to_json(found, indent=1))
    page = run_dir / "erasure.html"
    write_atomic(page, build_erasure_page(found))
    return page


def build_erasure_page(found: Mapping[str, Any]) -> str:
    """The document, from what `evidence` gives."""
    run, entries = found["run"], found["requests"]
    names = run["class_names"]
    figures = [f for f in (_over_run(entries), _relearning(entries), _attacks(entries)) if f is not None]
    main = "\n".join([
        findings(found),
        _guarantee(found),
        requests_table(entries, found["oracle"] is not None, names),
        refused_table(found["rejected"], names),
        f'<div class="figures">{"".join(map(_figure, figures))}</div>',
        evidence_tables(entries, names),
        memorisation_table(found.get("memorisation")),
        ledger_table(found["ledger"], names),
        traces_table(found["traces"]),
        f'<section class="card notes"><h2>How to read this</h2>{_NOTES}</section>',
    ])  # fmt: skip
    title = f"Erasure report: {short_name(run['strategy'])} on {short_name(run['stream'])}"
    return document("clplat erasure report", title, _facts(found), main, "The numbers are in erasure.json beside it.")


def _reference(oracle: Mapping[str, Any]) -> str:
    """The run that columns call "retrained", and a warning where its method does not make it one."""
    doubt = "" if oracle["guarantee"]["level"] == "exact" else ", itself approximate: no retrained model"
    return f"{oracle['strategy']}, seed {oracle['seed']}, {oracle['run_dir']}{doubt}"


def _facts(found: Mapping[str, Any]) -> str:
    run, oracle = found["run"], found["oracle"]
    facts = {
        "Run": f"{run['name']}, {run['run_dir']}", "Method": run["strategy"], "Stream": run["stream"],
        "Backbone": run["backbone"], "Seed": run["seed"], "Written": found["written"][:19].replace("T", " ") + " UTC",
        "Reference": "none" if oracle is None else _reference(oracle),
        "Configuration": str(run["config_sha256"])[:12],
        "Commit": str(run["git_commit"])[:10] if run["git_commit"] else None,
        "Checkpoint": str(run["checkpoint_sha256"])[:12] if run["checkpoint_sha256"] else None,
    }  # fmt: skip
    cells = "".join(f"<div><dt>{k}</dt><dd>{escape(str(v))}</dd></div>" for k, v in facts.items() if v is not None)
    return f'<dl class="facts">{cells}<div><dt>Status</dt><dd>{chip(str(run["status"]))}</dd></div></dl>'


def _guarantee(found: Mapping[str, Any]) -> str:
    """What the method promises, what it reads, and what no erasure in this run reaches."""
    run = found["run"]
    said = run["guarantee"]
    exact = said["level"] == "exact"
    own = {k: v for e in found["requests"] for k, v in e["strategy"].items()}
    measured = ""
    if own:
        items = "".join(f"<div><dt>{escape(k.replace('_', ' '))}</dt><dd>{show(v, 'number')}</dd></div>"
                        for k, v in own.items())  # fmt: skip
        measured = f'<h4>Measured by the method itself, last value</h4><dl class="facts">{items}</dl>'
    before = run["trained_before"]
    origin = (
        f"The weights had been trained before this run ({escape(before)}). What they learned of the erased data back "
        "then is undone only where the statement above includes it."
        if before else
        "The weights started from random numbers in this run; nothing was brought along."
    )  # fmt: skip
    label = (
        f'<span class="chip {"complete" if exact else "interrupted"}">{escape(said["level"] or "not stated")}</span>'
    )
    return f"""<section class="card"><h2>What the method covers</h2>
<p class="said">{label} {escape(_sentence(said["statement"]))}</p>
<p><b>Data read to answer a request:</b> {escape(said["data_access"])}.</p>
{measured}
<h4>Not covered by any statement here</h4>
<ul><li>{origin}</li>
<li>Copies of the data outside of the model: the data set itself, back-ups, logs.</li>
<li>Copies of the model from before a request: earlier checkpoints, tracking servers, models deployed elsewhere.</li>
</ul></section>"""


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


def _line(index: int, label: str, x: Sequence[float], y: Sequence[float | None]) -> Series | None:
    kept = [(a, v) for a, v in zip(x, y, strict=True) if v is not None]
    if not kept:
        return None
    return Series(index, label, [a for a, _ in kept], [v for _, v in kept], [None] * len(kept), [None] * len(kept))


def _over_run(entries: Sequence[dict[str, Any]]) -> Figure | None:
    """Accuracy on what each request erased, before it and until the end of the run."""
    shown = entries if len(entries) <= _MOST_LINES else [*entries[: _MOST_LINES - 1], entries[-1]]
    lines = [_line(i, e["name"], range(len(e["accuracy_over_run"])), e["accuracy_over_run"])
             for i, e in enumerate(shown)]  # fmt: skip
    kept = [line for line in lines if line is not None]
    if not kept:
        return None
    title = "Erased data, until the end of the run"
    caption = ("Accuracy on the held-out samples of each request (of one for single samples: on these) after each "
               "experience. Thin lines: requests. What comes back untaught is relapse.")  # fmt: skip
    if len(shown) < len(entries):
        caption += f" The first {_MOST_LINES - 1} of {len(entries)} requests, and the last."
    marks = [e["index"] + 1 for e in shown]
    panel = Lines(title, "experiences finished", "accuracy", kept, y_range=(0, 1), marks=marks)
    ends = "; ".join(f"{s.label} ends at {show(s.y[-1])}" for s in kept)
    return Figure("erased-over-run", title, caption, f"Lines over experiences. {ends}.", [panel])


def _attacks(entries: Sequence[dict[str, Any]]) -> Figure | None:
    """How well erased samples are told from unseen ones, request by request."""
    if len(entries) < 2:
        return None
    x = list(range(1, len(entries) + 1))

    def values(model: str, key: str) -> list[float | None]:
        return [None if e["models"][model] is None else e["models"][model][key] for e in entries]

    panels = []
    for title, key in (("Told from unseen data", "loss_auc"), ("Accuracy on what is kept", "accuracy_retained_test")):
        lines = [_line(i, label, x, values(model, key)) for i, (model, label) in enumerate(MODELS.items())]
        if kept := [line for line in lines if line is not None]:
            panels.append(Lines(title, "request", "", kept, y_range=(0, 1)))
    caption = "Left: 0.5 is guessing. The aim of both is the retrained model's line, where there is one."
    alt = "; ".join(f"{p.title}: " + ", ".join(f"{s.label} ends at {show(s.y[-1])}" for s in p.series) for p in panels)
    return Figure("requests", "Request by request", caption, f"Lines over requests. {alt}.", panels) if panels else None


MODELS = {"original": "before", "unlearned": "after", "oracle": "retrained"}


def _relearning(entries: Sequence[dict[str, Any]]) -> Figure | None:
    """Accuracy on the erased samples while copies learn them again, for the last request that was tried."""
    tried = [e for e in entries if (e["relearning"] or {}).get("accuracies")]
    if not tried:
        return None
    entry, found = tried[-1], tried[-1]["relearning"]
    curves = [(1, MODELS["unlearned"], found["accuracies"]), (2, MODELS["oracle"], found["oracle_accuracies"] or [])]
    lines = [_line(i, label, range(len(y)), y) for i, label, y in curves]
    kept = [line for line in lines if line is not None]
    title = f"Learning {entry['name']} again"
    panel = Lines(title, "gradient steps", "accuracy", kept, y_range=(0, 1))
    caption = ("Accuracy on the erased samples while copies of the weights are trained on them; "
               f"{show(found['target'])} counts as learned again.")  # fmt: skip
    alt = "; ".join(f"{s.label} reaches {show(s.y[-1])} after {s.x[-1]:g} steps" for s in kept)
    return Figure("relearning", title, caption, f"Lines over gradient steps. {alt}.", [panel])


def _figure(figure: Figure) -> str:
    size, width = {1: ("one", WIDE), 2: ("two", WIDE)}.get(len(figure.panels), ("many", NARROW))
    panels = []
    for panel in figure.panels:
        title = "" if panel.title == figure.title else f"<h4>{escape(panel.title)}</h4>"
        panels.append(f'<div class="panel">{title}{render(panel, f"{panel.title}. {figure.alt}", width)}</div>')
    labels = {s.group: s.label for p in figure.panels if isinstance(p, Lines) for s in p.series}
    keys = "".join(f'<span class="key">{_swatch(i)}{escape(label)}</span>' for i, label in sorted(labels.items()))
    head = f'<h3>{escape(figure.title)}</h3><p class="keys">{keys}</p>'
    drawn, caption = "".join(panels), f"<figcaption>{escape(figure.caption)}</figcaption>"
    return f'<figure class="card {size}">{head}<div class="panels">{drawn}</div>{caption}</figure>'


def _swatch(index: int) -> str:
    shape = f'<path class="line" d="M1 8H23"/>{marker(index, 12, 8, 4)}'
    return f'<svg class="swatch s {group_class(index)}" viewBox="0 0 24 16" aria-hidden="true">{shape}</svg>'
