"""A study as Optuna draws it: one page of interactive figures that needs no network."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path
from typing import Any

from clplat.files import write_atomic
from clplat.sweep.plan import Plan

_STYLE = "body{font:15px/1.5 system-ui,sans-serif;margin:24px auto;max-width:1100px;padding:0 16px}"


def draw(study: Any, plan: Plan) -> Path:
    """Write study.html: front (of two metrics), history, importances, parallel coordinates, slices, timeline.

    A figure that can't be made of the trials that there are stands as a line that says why.
    """
    from plotly.offline import get_plotlyjs

    parts = []
    for title, make in _figures(study, plan):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that a function is experimental, or a trial lacks a parameter
                figure = make()
            body = figure.to_html(full_html=False, include_plotlyjs=False, config={"displaylogo": False})
        except Exception as error:  # noqa: BLE001 - too few trials, or all of one value: the study is done all the same
            body = f"<p>Not drawn: {escape(' '.join(str(error).split()) or type(error).__name__)}</p>"
        parts.append(f"<h2>{escape(title)}</h2>{body}")
    name, protocol = escape(plan.study), str(plan.protocol)
    page = (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Study {name}</title>'
            f"<style>{_STYLE}</style><script>{get_plotlyjs()}</script></head><body><h1>Study {name}</h1>"
            f"<p>{protocol[0].upper()}{escape(protocol[1:])}. Figures are of validation data. A value outside of the "
            f"space, as the default may have, is left out of figures over it.</p>"
            f"{''.join(parts)}</body></html>\n")  # fmt: skip
    path = plan.folder / "study.html"
    write_atomic(path, page)
    return path


def _figures(study: Any, plan: Plan) -> Iterator[tuple[str, Callable[[], Any]]]:
    from optuna import visualization

    if len(plan.metrics) > 1:
        yield "Front", lambda: visualization.plot_pareto_front(study, target_names=plan.metrics)
    for i, metric in enumerate(plan.metrics):
        of: dict[str, Any] = {"target_name": metric}
        if len(plan.metrics) > 1:
            of["target"] = lambda trial, i=i: trial.values[i]
        for what in ("optimization_history", "param_importances", "parallel_coordinate", "slice"):
            make = getattr(visualization, f"plot_{what}")
            title = f"{what.replace('_', ' ').replace('param ', '').capitalize()}: {metric}"
            yield title, functools.partial(make, study, **of)
    yield "Timeline", lambda: visualization.plot_timeline(study)
