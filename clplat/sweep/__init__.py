"""Hyper-parameter search: the plan of a study, and the study.

May import the contract, `config`, `metrics` and `api`.
"""
