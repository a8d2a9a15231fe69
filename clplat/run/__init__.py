"""A run: built, launched, looped over a stream, measured, saved and resumed.

May import the contract, `config`, `data`, `backbones`, `components`, `adapters`, `metrics`, `erasure` and
`tracking`.
"""

import sys

from clplat.package import Door

function_in = "clplat.api"
sys.modules[__name__].__class__ = Door
