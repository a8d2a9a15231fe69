"""Data and what streams are made of: data sets on disk, scenarios, splits, tokens, batches, corruptions.

May import the contract (`stream`, `strategy`, `errors`) and `config`.
"""
