"""From YAML and flags to a checked configuration, and what there is to configure: strategies, streams, backbones.

Imports no torch. May import the contract.
"""
