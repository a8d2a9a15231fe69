"""Hyper-parameter search: the plan of a study, and the study.

May import everything but `testing` and `commands`.
"""
