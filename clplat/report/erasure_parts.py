"""Parts of the erasure report: findings in words, the requests, the evidence for each, the ledger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from clplat.report.numbers import NONE, show
from clplat.report.parts import table

_MOST_IDS = 6
Entry = Mapping[str, Any]

# Rows of a request's evidence: key of a model's numbers, what it is, how to read it.
_ROWS = (
    ("accuracy_erased", "Accuracy on the erased training samples", ""),
    ("accuracy_erased_test", "Accuracy on held-out samples that go with them", ""),
    ("accuracy_retained", "Accuracy on training samples kept", ""),
    ("accuracy_retained_test", "Accuracy on held-out samples kept", ""),
    ("loss_auc", "Told from unseen data, by the loss (AUC)", "0.5 is guessing"),
    ("loss_attack_accuracy", "The same, as the accuracy of a fitted attacker", "0.5 is guessing"),
    ("forget_efficacy", "Share of erased samples taken for never trained on", "by an SVM on the confidence"),
    ("retained_loss_auc", "Kept samples told from unseen data (AUC)", "a request must not expose what stays"),
    ("probe_accuracy", "Erased held-out samples, by a new classifier on the features", ""),
)
# AUCs with intervals; the same.
_FORENSIC = (
    ("forensic_unseen", "Erased told from never seen, by this model alone (AUC)"),
    ("forensic_retained", "Erased told from retained, by this model alone (AUC)"),
)
_DISTANCES = (
    ("agreement", "Same prediction (share)"),
    ("js_divergence", "Jensen-Shannon divergence (nats, at most 0.693)"),
    ("activation_distance", "Distance of the probabilities"),
    ("logit_difference", "Largest difference of a logit"),
)
_SETS = {"erased": "erased", "erased_test": "erased, held out", "retained": "kept", "retained_test": "kept, held out"}


def findings(found: Entry) -> str:
    """In short: counts as tiles, then what was found, in sentences."""
    entries, whole = found["requests"], found["summary"]
    tiles = {
        "Requests answered": f"{whole['requests_done']} of {whole['requests_in_stream']}",
        "Samples erased": f"{whole['training_samples_erased']:,}".replace(",", " "),
        "Requests refused": str(whole["requests_refused"]),
        "Median time of a request": show(whole["median_request_seconds"], "seconds"),
    }
    if whole["oracle_seconds"] and whole["request_seconds"]:
        tiles["Retraining, relative"] = f"{show(whole['oracle_seconds'] / whole['request_seconds'], 'number')} ×"
    cells = "".join(f"<div><dt>{k}</dt><dd>{escape(v)}</dd></div>" for k, v in tiles.items())
    said = "".join(f"<li>{s}</li>" for s in _sentences(entries, found["oracle"] is not None))
    body = f'<dl class="tiles">{cells}</dl><ul class="found">{said}</ul>'
    return f'<section class="card"><h2>In short</h2>{body}</section>'


def _sentences(entries: Sequence[Entry], reference: bool) -> list[str]:
    """What the measurements say, in plain words; over several requests the mean, and the last."""
    held_out = len(_values(entries, "unlearned", "accuracy_erased_test")) > 0
    key = "accuracy_erased_test" if held_out else "accuracy_erased"
    what = "held-out samples of what was erased" if held_out else "erased samples"
    lines = [
        (key, f"Of the {what}, the model named {{original}} right before the requests and "
              "{unlearned} after{oracle}."),
        ("accuracy_retained_test", "Of the held-out samples of what was kept, it named {original} right before and "
                                   "{unlearned} after{oracle}."),
        ("loss_auc", "An outsider who compares losses tells an erased sample from an unseen one in {original} of cases "
                     "before and {unlearned} after{oracle}; 50 % is guessing."),
        ("probe_accuracy", "A new classifier on the model's features still names {unlearned} of the erased held-out "
                           "samples right (before: {original}{oracle})."),
    ]  # fmt: skip
    said = [text for key, form in lines if (text := _filled(form, entries, key, reference))]
    said += _forensic_sentence(entries[-1]) + _lira_sentence(entries[-1].get("lira"))
    again = [e["relearning"] for e in entries if (e["relearning"] or {}).get("unlearned")]
    if again:
        theirs = f" (retrained: {_steps(again[-1]['oracle'])})" if again[-1]["oracle"] else ""
        said.append(f"Gradient steps until it has learned again what the last request erased: "
                    f"<b>{_steps(again[-1]['unlearned'])}</b>{theirs}.")  # fmt: skip
    elif hopeless := [w for e in entries if (w := e["why_null"].get("relearning.unlearned"))]:
        said.append(f"Gradient steps can't teach it the erased samples again: {escape(hopeless[-1])}.")
    back = [v for e in entries if (v := e["metrics"].get("relapse")) is not None]
    if back:
        said.append(f"Later experiences gave back at most <b>{percent(max(0.0, *back))}</b> of accuracy on what a "
                    "request had erased, without teaching it again.")  # fmt: skip
    close = [e["against_oracle"] for e in entries if e["against_oracle"]]
    if close and close[-1].get("retained_test"):
        last = close[-1]
        sets = [s for s in ("erased", "retained_test") if s in last]
        parts = [f"{percent(last[s]['agreement'])} of the samples {_SETS[s]}" for s in sets]
        said.append(f"After the last request it predicts what the retrained model does for {' and '.join(parts)}.")
    elif not reference:
        said.append("<b>No reference run was given</b>, so what a model without the erased data would do is not known. "
                    "<code>clplat report RUN --oracle REFERENCE_RUN</code> adds it.")  # fmt: skip
    return said


def _forensic_sentence(entry: Entry) -> list[str]:
    """Whether the last request can be found out from the model that it left."""
    parts, model = [], entry["models"]["unlearned"] or {}
    for key, others in (("forensic_unseen", "one never seen"), ("forensic_retained", "one retained")):
        if found := model.get(key):
            verdict = "better than guessing" if found["low"] > 0.5 else "not shown to be better than guessing"
            parts.append(f"from {others} with AUC <b>{with_interval(found)}</b> ({verdict})")
    told = " and ".join(parts)
    return [f"From the model after the last request alone, an attacker tells an erased sample {told}."] if parts else []


def _lira_sentence(found: Entry | None) -> list[str]:
    if found is None:
        return []
    return [f"An attacker with {found['shadows']} shadow models tells an erased sample from one never seen with AUC "
            f"<b>{with_interval(found['unlearned'])}</b> (before: {with_interval(found['original'])}); their training "
            f"took {show(found['seconds'], 'seconds')}."]  # fmt: skip


def percent(share: float) -> str:
    """A share in per cent with one decimal; 0 and 100 only where they are true."""
    text = f"{100 * share:.1f}"
    if share in (0, 1):
        text = f"{100 * share:.0f}"
    elif text in ("0.0", "100.0"):
        text = "&lt; 0.1" if share < 0.5 else "&gt; 99.9"
    return f"{text}\N{NO-BREAK SPACE}%"


def _values(entries: Sequence[Entry], model: str, key: str) -> list[float]:
    found = [(e["models"][model] or {}).get(key) for e in entries]
    return [v for v in found if v is not None]


def _filled(form: str, entries: Sequence[Entry], key: str, reference: bool) -> str | None:
    """The sentence with its numbers; None where one is missing."""
    texts = {}
    for model in ("original", "unlearned", "oracle"):
        values = _values(entries, model, key)
        text = ""
        if values:
            text = f"<b>{percent(sum(values) / len(values))}</b>"
            if len(values) > 1 and model == "unlearned":
                text += f" (last request: {percent(values[-1])})"
        texts[model] = text
    if not texts["original"] or not texts["unlearned"]:
        return None
    texts["oracle"] = f"; the retrained model {texts['oracle']}" if reference and texts["oracle"] else ""
    return form.format(**texts)


def _steps(time: Mapping[str, Any] | None) -> str:
    if time is None:
        return NONE
    return f"&gt; {time['steps']}" if time["censored"] else str(time["steps"])


def ids(request: Sequence[str], names: Sequence[str]) -> str:
    """Ids of a request, the first of many; a class with its name."""
    more = f" and {len(request) - _MOST_IDS} more" if len(request) > _MOST_IDS else ""
    return (
        " ".join(f"<code>{escape(i)}</code>{_name(i, names)}" for i in request[:_MOST_IDS]) + more if request else NONE
    )


def _name(asked: str, names: Sequence[str]) -> str:
    """In brackets the name of the class that an id of a request means, where it says more than the number."""
    kind, _, number = asked.partition(":")
    index = int(number) if kind == "class" and number.isdecimal() else len(names)
    return f" ({escape(names[index])})" if index < len(names) and names[index] != number else ""


def _time(stamp: str | None) -> str:
    return NONE if stamp is None else escape(stamp[:19].replace("T", " "))


def _arrow(entry: Entry, key: str) -> str:
    """before → after."""
    before, after = ((entry["models"][m] or {}).get(key) for m in ("original", "unlearned"))
    return f"{show(before)} → {show(after)}"


def requests_table(entries: Sequence[Entry], reference: bool, names: Sequence[str]) -> str:
    """What was asked and done, a row a request."""
    head = ["Request", "What was asked to be erased", "samples", "answered (UTC)", "took", "accuracy on it",
            "told from unseen", "accuracy kept"]  # fmt: skip
    if reference:
        head[5:5] = ["retraining"]
    rows = []
    for e in entries:
        key = "accuracy_erased" if (e["models"]["unlearned"] or {}).get("accuracy_erased_test") is None else (
            "accuracy_erased_test")  # fmt: skip
        when = " (made after the run)" if e["late"] else ""
        row = [escape(e["name"]) + when, ids(e["request"], names), f"{e['training_samples']:,}".replace(",", " "),
               _time(e["finished"]).replace(" ", "<br>"), show(e["seconds"], "seconds")]  # fmt: skip
        row += [show(e["oracle_seconds"], "seconds")] if reference else []
        rows.append([*row, _arrow(e, key), _arrow(e, "loss_auc"), _arrow(e, "accuracy_retained_test")])
    caption = "Before → after. Accuracy is over held-out samples; of a request for single samples, over these."
    return (
        f'<section class="card asked"><h2>What was asked and done</h2>{table(caption, head, rows, words=2)}</section>'
    )


def refused_table(events: Sequence[Entry], names: Sequence[str]) -> str:
    """Requests that were refused, and why."""
    if not events:
        return '<section class="card"><h2>Refused requests</h2><p class="empty">None in this run.</p></section>'
    rows = [[escape(str(e.get("name"))), ids(e.get("request") or [], names), _time(e.get("started")),
             escape(str(e["outcome"]).partition(":")[2].strip())] for e in events]  # fmt: skip
    head = ["Request", "What was asked", "When (UTC)", "Why it was refused"]
    body = table("Nothing was changed by these", head, rows, words=4)
    return f'<section class="card asked"><h2>Refused requests</h2>{body}</section>'


def traces_table(entries: Sequence[Entry]) -> str:
    """What still derives from erased samples, file by file."""
    title = "<h2>What still derives from erased samples</h2>"
    if not entries:
        nothing = "Nothing in the run's folder but figures over all of them."
        return f'<section class="card">{title}<p class="empty">{nothing}</p></section>'
    rows = [[f"<code>{escape(e['path'])}</code>", escape(e["holds"])] for e in entries]
    caption = "<code>clplat forget RUN_DIR --purge</code> removes what is the run's own"
    return f'<section class="card asked">{title}{table(caption, ["File", "Holds"], rows, words=2)}</section>'


def evidence_tables(entries: Sequence[Entry], names: Sequence[str]) -> str:
    """For each request all that was measured; the last one is open."""
    blocks = []
    for e in entries:
        is_open, head = " open" if e is entries[-1] else "", f"{escape(e['name'])}: {ids(e['request'], names)}"
        blocks.append(f"<details{is_open}><summary>{head}</summary>{_evidence(e)}</details>")
    return f'<section class="card"><h2>Evidence, request by request</h2>{"".join(blocks)}</section>'


def _evidence(e: Entry) -> str:
    models, parts = e["models"], []
    if models["unlearned"] is not None:
        rows = []
        for key, label, note in _ROWS:
            values = [(models[m] or {}).get(key) for m in ("original", "unlearned", "oracle")]
            if any(v is not None for v in values):
                more = f'<span class="why">{escape(note)}</span>' if note else ""
                rows.append([escape(label) + more, *map(show, values)])
        rows += _forensic_rows(models)
        rows += _lira_rows(e.get("lira"))
        rows += _relearn_rows(e["relearning"])
        sizes = models["unlearned"]
        scored = "; ".join(f"{sizes['scored'][s]} of {sizes['sizes'][s]} {label}" for s, label in _SETS.items()
                           if sizes["sizes"][s])  # fmt: skip
        parts.append(table(f"Scored: {scored}", ["Measure", "before", "after", "retrained"], rows))
    if e["against_oracle"]:
        parts.append(_distance_table(e["against_oracle"]))
    own = [[f"<code>{escape(k)}</code>", show(v, "number")] for k, v in e["strategy"].items()]
    own += [[f"<code>{escape(k)}</code>", show(v)] for k, v in e["metrics"].items() if v is not None]
    if own:
        parts.append(table("Of the method itself, and this request's part of the metrics", ["Quantity", "value"], own))
    hashes = [[f"Model {label}", f"<code>{m['model_sha256']}</code>"] for label, m in
              (("before", models["original"]), ("after", models["unlearned"])) if m is not None]  # fmt: skip
    hashes += [["Rows erased", f"<code>{escape(e['rows_sha256'])}</code>"]] if e["rows_sha256"] else []
    if hashes:
        parts.append(table("SHA-256", ["Of", "digest"], hashes, words=2))
    if e["why_null"]:
        rows = [[f"<code>{escape(k)}</code>", escape(v)] for k, v in e["why_null"].items()]
        parts.append(table("Not measured", ["Quantity", "Why"], rows, words=2))
    return "".join(parts)


def memorisation_table(found: Entry | None) -> str:
    """TOFU's or MUSE's measures of a language model, beside those of the retrained one; nothing where none was made."""
    if found is None:
        return ""
    models = [found["run"], found["retrained"] or {}]
    rows = [[escape(key.replace("_", " ")), *(show(m.get(key)) for m in models)] for key in models[0]]
    both = [[escape(key.replace("_", " ")), show(found[key], "number")] for key in ("forget_quality", "privacy_leakage")
            if key in found]  # fmt: skip
    asked = "; ".join(f"{count} of {escape(name)}" for name, count in found["asked"].items())
    parts = [table(f"Asked: {asked}", ["Measure", "after", "retrained"], rows),
             table("Of both models (privacy leakage in per cent)", ["Measure", "value"], both)]  # fmt: skip
    if found["why_null"]:
        why = [[f"<code>{escape(k)}</code>", escape(v)] for k, v in found["why_null"].items()]
        parts.append(table("Not measured", ["Quantity", "Why"], why, words=2))
    parts += [f"<p>{escape(note)}.</p>" for note in found["notes"]]
    title = f"Memorisation, as {str(found['benchmark']).upper()} measures it"
    return f'<section class="card"><h2>{title}</h2>{"".join(parts)}</section>'


def _forensic_rows(models: Mapping[str, Entry | None]) -> list[list[str]]:
    """Which samples were erased, from each model alone; audits of earlier versions have no such numbers."""
    rows = []
    for key, label in _FORENSIC:
        found = [(models[m] or {}).get(key) for m in ("original", "unlearned", "oracle")]
        if known := next((v for v in found if v is not None), None):
            a, b = known["tested"]
            note = f'<span class="why">{a} against {b}, {escape(known["of"])}; 95 % interval; 0.5 is guessing</span>'
            rows.append([escape(label) + note, *(NONE if v is None else with_interval(v) for v in found)])
    return rows


def _lira_rows(found: Entry | None) -> list[list[str]]:
    """U-LiRA: how many shadow models, on what, at what cost."""
    if found is None:
        return []
    how = (f"{found['shadows']} shadow models in {show(found['seconds'], 'seconds')}; {found['erased']} against "
           f"{found['unseen']}, {found['of']}; 95 % interval over samples, of one model")  # fmt: skip
    label = f'Erased told from never seen, sample by sample (U-LiRA, AUC)<span class="why">{escape(how)}</span>'
    return [[label, with_interval(found["original"]), with_interval(found["unlearned"]), NONE]]


def with_interval(found: Entry) -> str:
    """An AUC and its interval."""
    return f"{show(found['auc'])} [{show(found['low'])}, {show(found['high'])}]"


def _relearn_rows(found: Entry | None) -> list[list[str]]:
    if found is None:
        return []
    rows = [["Gradient steps to learn it again", NONE, _steps(found["unlearned"]), _steps(found["oracle"])]]
    if (index := found["anamnesis_index"]) is not None:
        bound = "" if index["bound"] == "exact" else f"{index['bound']} "
        note = '<span class="why">steps of the model after over those of the retrained one; 1 is ideal</span>'
        rows.append([f"Anamnesis index{note}", NONE, bound + show(index["value"], "number"), NONE])
    return rows


def _distance_table(found: Entry) -> str:
    sets, rows = [s for s in _SETS if s in found], []
    for key, label in _DISTANCES:
        unit = "fraction" if key == "agreement" else "number"
        rows.append([escape(label), *(show(found[s][key], unit) for s in sets)])
    body = table("From the retrained model, by set", ["Measure", *(_SETS[s] for s in sets)], rows)
    whole = {"Tug-of-war (1 is best)": found["tug_of_war"], "Average gap (0 is best)": found["average_gap"]}
    whole |= {f"Gap in {k}": v for k, v in (found["gaps"] or {}).items()}
    names = {"UA": "error on the erased", "RA": "accuracy kept", "TA": "accuracy kept, held out", "MIA": "membership"}
    rows = [[escape(k if not k.startswith("Gap in") else f"Gap in {names[k[7:]]}"), show(v)] for k, v in whole.items()]
    return body + table("From the retrained model, in accuracy", ["Measure", "value"], rows)


def ledger_table(events: Sequence[Entry], names: Sequence[str]) -> str:
    """Everything that was learned and erased, as it was written down while it happened."""
    if not events:
        return ""
    rows = []
    for e in events:
        digest = f"<code>{escape(str(e['rows_sha256'])[:12])}</code>" if e.get("rows_sha256") else NONE
        request, classes = e.get("request") or [], e.get("classes") or []
        asked = ids(request, names) if request else escape(_classes(classes, names))
        rows.append([escape(str(e["name"])), escape(str(e["kind"])), asked, _time(e.get("started")),
                     _time(e.get("finished")), digest, escape(str(e["outcome"]).partition(":")[0]),
                     f"{e['samples']:,}".replace(",", " "), show(e.get("seconds"), "seconds")])  # fmt: skip
    head = ["Experience", "Kind", "Request, or classes", "Started (UTC)", "Finished (UTC)", "Rows (SHA-256)", "Outcome",
            "samples", "took"]  # fmt: skip
    body = table("In order; digests are of the sorted row numbers, whole in erasure.json", head, rows, words=7)
    return f'<section class="card asked"><h2>Ledger</h2>{body}</section>'


def _classes(classes: Sequence[int], names: Sequence[str]) -> str:
    shown = ", ".join(names[c] if c < len(names) else str(c) for c in classes[:_MOST_IDS])
    return shown + (f" and {len(classes) - _MOST_IDS} more" if len(classes) > _MOST_IDS else "") if classes else NONE
