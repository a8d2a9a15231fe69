"""The chart layout for MLflow's runs page: a saved view, kept as a tag of the experiment.

MLflow (3.15 and later) reads such a view from the tag `mlflow.sharedViewState.<key>`. The format is undocumented, so
nothing is written to a version it was not seen to work with.
"""

from __future__ import annotations

import base64
import json
import time
import zlib
from typing import Any
from urllib.parse import urlencode

from clplat.tracking.names import GROUP_TAG

VIEW = "clplat"
TAG = f"mlflow.sharedViewState.{VIEW}"
LAYOUT_VERSION = "2"  # raise it when SECTIONS changes, so that experiments get the new layout
VERSION_TAG = "clplat.layout"
LIMIT = 5000  # characters that a tag of an experiment holds in a database

# Section → (title of chart, metric).
SECTIONS: dict[str, list[tuple[str, str]]] = {
    "Continual learning": [
        ("Average accuracy", "average_accuracy"),
        ("Forgetting", "forgetting"),
        ("Average incremental accuracy", "average_incremental_accuracy"),
        ("Backward transfer", "backward_transfer"),
        ("Plasticity", "plasticity"),
        ("Stability", "stability"),
    ],
    "Inside experiences": [
        ("Loss", "train/loss"),
        ("Anytime accuracy", "anytime/accuracy"),
        ("Online error", "adapt/online_error"),
        ("Return", "interact/return"),
    ],
    "Representation": [
        ("Dormant units", "representation/dormant_fraction"),
        ("Effective rank", "representation/effective_rank"),
    ],
    "Cost": [("Training seconds", "cost/train_seconds"), ("Peak memory", "cost/peak_rss_bytes")],
}
COLUMNS = ["params.`strategy.name`", "params.`stream.name`", "tags.`seed`", "metrics.`average_accuracy`",
           "metrics.`forgetting`"]  # fmt: skip


def supported(version: str) -> bool:
    """Whether MLflow `version` shows views kept as tags, in the format written here."""
    major, minor = (int(part) for part in version.split(".")[:2])
    return major == 3 and minor >= 15


def view(name: str = VIEW) -> str:
    """Value of the tag."""
    charts: list[dict[str, Any]] = []
    sections: list[dict[str, Any]] = []
    for s, (section, members) in enumerate(SECTIONS.items()):
        sections.append({"uuid": f"clplat-{s}", "name": section, "display": True, "isReordered": False,
                         "deleted": False, "isGenerated": False})  # fmt: skip
        charts += [
            {"type": "LINE", "uuid": f"clplat-{s}-{c}", "metricSectionId": f"clplat-{s}", "metricKey": metric,
             "selectedMetricKeys": [metric], "displayName": title, "xAxisKey": "step", "xAxisScaleType": "linear",
             "scaleType": "linear", "lineSmoothness": 0, "runsCountToCompare": 20, "useGlobalXaxisKey": False,
             "deleted": False, "isGenerated": False}
            for c, (title, metric) in enumerate(members)
        ]  # fmt: skip
    state = {
        "compareRunCharts": charts,
        "compareRunSections": sections,
        "isAccordionReordered": True,
        "hideEmptyCharts": True,
        "selectedColumns": COLUMNS,
        "orderByKey": "attributes.start_time",
        "orderByAsc": False,
        # Runs that differ in their seed alone as one line, their mean; by none, trials stand under their study.
        "groupBy": {"aggregateFunction": "average", "groupByKeys": [{"mode": "tag", "groupByData": GROUP_TAG}]},
        "useGroupedValuesInCharts": True,
    }
    packed = "deflate;" + base64.b64encode(zlib.compress(json.dumps(state).encode(), 9)).decode()
    return json.dumps({"name": name, "createdAt": int(time.time() * 1000), "state": packed})


def link(base: str, experiment_id: str) -> str:
    """Address that opens the experiment's charts in this layout on the server at `base`."""
    query = urlencode({"workflowType": "machine_learning", "compareRunsMode": "CHART", "viewStateShareKey": VIEW})
    return f"{base}/#/experiments/{experiment_id}/runs?{query}"
