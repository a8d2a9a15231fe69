"""What strategies are composed of: memories, slow copies, per-parameter state, ridge regression, hypernetworks.

May import the contract, `data` and `backbones`.
"""
