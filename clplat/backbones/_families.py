"""What is known of the families of language models in transformers, and what is found out of the others.

`tests/backbones/test_families.py` holds every family that can be built small to a plain forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from clplat.errors import UserError

# Decoders whose attention is all that mixes tokens, and which take their positions and a mask of any form as given: all
# answers are read in one pass behind their prompt, and prompts may be padded in front. Others get a pass an answer.
ONE_PASS = frozenset(
    ("apertus", "arcee", "biogpt", "codegen", "cohere", "cohere2", "ernie4_5", "exaone4", "gemma", "gemma2",
     "gemma3_text", "glm", "glm4", "gpt2", "gpt_bigcode", "gpt_neox", "gpt_oss", "gptj", "granite", "granitemoe",
     "helium", "llama", "ministral", "mistral", "mixtral", "nemotron", "olmo", "olmo2", "olmo3", "olmoe", "opt", "phi",
     "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3", "stablelm", "starcoder2", "xglm")
)  # fmt: skip
# Encoder-decoders whose logits change with the padding that other samples of a batch make necessary.
PADDED_ELSE = frozenset(("fsmt", "prophetnet"))


def sees(config: Any) -> float:
    """Tokens that every layer of a decoder of `ONE_PASS` sees: its attention window, or infinity."""
    return getattr(config, "sliding_window", None) or torch.inf


def fixed_length(config: Any) -> float:
    """Tokens up to which a decoder computes the same whatever else is in the batch; infinity: any number.

    Rotary positions of the kind longrope are scaled in another way once the longest row of a batch is longer; an
    indexer that picks the tokens to attend to picks padding, too, once there are more than it picks.
    """
    ropes = getattr(config, "rope_parameters", None) or {}
    kinds = [r for r in (ropes, *ropes.values()) if isinstance(r, dict) and r.get("rope_type") == "longrope"]
    known = [k.get("original_max_position_embeddings") for k in kinds]
    known += [getattr(config, "original_max_position_embeddings", None)] if kinds else []
    return min((k for k in (*known, getattr(config, "index_topk", None)) if k is not None), default=torch.inf)


def fused(module: nn.Module) -> bool:
    """Whether a module holds weights of three dimensions that are no convolution's: layers of experts in one tensor."""
    own = module.parameters(recurse=False)
    return not isinstance(module, nn.Conv1d) and any(sum(size > 1 for size in p.shape) > 2 for p in own)


def read_past(net: nn.Module) -> frozenset[str]:
    """Names of the layers of Mamba's mixers whose weights their fused kernels read, past the layers themselves."""
    mixers = [(n, m) for n, m in net.named_modules() if hasattr(m, "A_log") and hasattr(m, "D")]
    return frozenset(f"{n}.{leaf}" for n, m in mixers for leaf, _ in m.named_children() if leaf != "in_proj")


def check(net: Any) -> None:
    """Refuse a model that is fed with more than text, or whose logits depend on tokens that are still to be written.

    What is asked of the model is structure, not numbers: the gradient of a logit in a later token must be zero.

    Raises:
        UserError: as said; or a family that is known to need its batches without padding.
    """
    kind, seen = net.config.model_type, list[Tensor]()
    if kind in PADDED_ELSE:
        raise UserError(
            f"backbone.weights: what a {kind} answers depends on the rest of its batch (valid: t5, bart, ...)"
        )

    def watch(_: Any, __: Any, output: Tensor) -> Tensor:
        seen.append(output.detach().requires_grad_())
        return seen[-1].clone()

    ids = torch.arange(3, 8)[None] % net.config.get_text_config(decoder=True).vocab_size
    both = {"decoder_input_ids": ids} if net.config.is_encoder_decoder else {"use_cache": False}
    training = net.training
    try:
        with torch.enable_grad(), _watched(net, watch):
            logits = net.eval()(input_ids=ids, **both).logits
            (moved,) = torch.autograd.grad(logits[0, 1].float().sum(), seen[-1])
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError) as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        raise UserError(f"backbone.weights: a {kind} can't be run on token ids alone ({why})") from error
    finally:
        net.train(training)
    if moved.flatten(0, -2)[2:].any():
        raise UserError(
            f"backbone.weights: this {kind} reads an answer before it writes it, and so is no decoder (valid: a causal "
            "model; where its config.json has is_decoder: true)"
        )


@contextmanager
def _watched(net: Any, watch: Callable[..., Tensor]) -> Iterator[None]:
    """Call `watch` on what the embedding of the tokens that are to be written puts out."""
    own = net.get_decoder().get_input_embeddings() if net.config.is_encoder_decoder else None
    handle = (own or net.get_input_embeddings()).register_forward_hook(watch)
    try:
        yield
    finally:
        handle.remove()
