"""Low-rank adapters that strategies share, on Hugging Face `peft`; importing this does not import it.

May import the contract, `backbones` and `components`.
"""

from clplat.adapters.average import WeightAverage
from clplat.adapters.lora import LoRA, block_of, plain_state

__all__ = ["LoRA", "WeightAverage", "block_of", "plain_state"]
