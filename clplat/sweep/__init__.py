"""Hyper-parameter search: the plan of a study, and the study.

May import the contract, `config`, `metrics`, `tracking`, `launchers` and `run`.
"""

import sys

from clplat.package import Door

function_in = "clplat.sweep.study"
sys.modules[__name__].__class__ = Door
