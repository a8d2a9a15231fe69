"""What strategies are composed of: memories, slow copies, per-parameter state, ridge regression, hypernetworks, norms.

May import the contract, `data` and `backbones`.
"""
