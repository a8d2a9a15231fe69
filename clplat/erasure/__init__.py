"""Requests to forget: the ledger, what a request names, the stream without it, requests made late, the audit.

May import the contract, `config`, `components` and `metrics`.
"""
