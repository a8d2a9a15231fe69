"""Backbones: one file per family; each public function that returns a `Backbone` is one, under its own name."""
