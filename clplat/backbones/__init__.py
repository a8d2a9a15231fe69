"""Backbones: one file per family; each public function that returns a `Backbone` is one, under its own name.

With them their heads, and language models as classifiers. May import the contract and `data`.
"""
