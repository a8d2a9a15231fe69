"""MLflow: the client of a run, the local store, its server, and the layout of its charts.

May import the contract, `config` and `metrics`.
"""
