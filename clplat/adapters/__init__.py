"""Low-rank adapters that strategies share, on Hugging Face `peft`; importing this does not import it."""

from clplat.adapters.lora import LoRA, block_of, plain_state

__all__ = ["LoRA", "block_of", "plain_state"]
