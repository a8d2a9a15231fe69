"""What is known of the families of language models in transformers, and what is found out of the others.

`tests/backbones/test_families.py` holds every family that can be built small to a plain forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

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


def repeated(part: nn.Module) -> list[nn.Module]:
    """The blocks of a stack: the members of its outermost list of modules."""
    return list(next((m for m in part.modules() if isinstance(m, nn.ModuleList)), []))


def role(name: str, stems: Sequence[str]) -> Literal["attention", "ffn"] | None:
    """What a layer called `name` does in the block whose name and dot is one of `stems`; None in no block."""
    stem = next((s for s in stems if name.startswith(s)), None)
    if stem is None:
        return None
    inside = name.removeprefix(stem).lower()
    return "attention" if "attn" in inside or "attention" in inside else "ffn"


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


def check_encoder(net: Any) -> frozenset[str]:
    """Names of the parameters of an encoder that its states do not depend on (a part for entities, say).

    Refuses a model whose first state does not depend on a later token, or any state on padding; whose blocks put out
    anything but (B, L, D) states; or that can't be run. What is asked is structure, not numbers, as in `check`.

    Raises:
        UserError: as said.
    """
    kind, seen, training = net.config.model_type, list[Tensor](), net.training

    def watch(_: Any, __: Any, output: Tensor) -> Tensor:
        seen.append(output.detach().requires_grad_())
        return seen[-1].clone()

    def note(_: Any, __: Any, output: Any) -> None:
        shapes.append(getattr(output[0] if isinstance(output, tuple) else output, "shape", ())[:2])

    length = -(-6 // width(net.config)) * width(net.config)
    real, shapes = torch.arange(length)[None] < 4, list[tuple[int, ...]]()  # four tokens, padding behind them
    handles = [block.register_forward_hook(note) for block in encoder_blocks(net)]  # some are called past their hooks
    try:
        ids = (torch.arange(3, length + 3)[None] % net.config.vocab_size).where(real, net.config.pad_token_id or 0)
        with torch.enable_grad(), _watched(net, watch):
            states = net.eval()(input_ids=ids, attention_mask=real.long()).last_hidden_state
            if len(shapes) < len(handles) or (other := {tuple(s) for s in (*shapes, states.shape[:2])} - {(1, length)}):
                what = f"states of shape {other.pop()}" if len(shapes) >= len(handles) else "no states"
                raise ValueError(f"blocks put out {what} for {length} tokens")
            # A plain sum over features is the same for any tokens where a normalisation comes last.
            each = states[0].float() @ torch.linspace(-1, 1, states.shape[2])
            first, of_all = (torch.autograd.grad(e, seen[-1], retain_graph=True)[0] for e in (each[0], each[:4].sum()))
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError) as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        raise UserError(f"backbone.weights: a {kind} can't be run as an encoder of token ids ({why})") from error
    finally:
        net.train(training)
        for handle in handles:
            handle.remove()
    if of_all.flatten(0, -2)[4:].any():
        raise UserError(
            f"backbone.weights: what a {kind} makes of a text depends on the padding behind it, and so on the rest of "
            "its batch (valid: bert, roberta, deberta, ...)"
        )
    if not first.flatten(0, -2)[3].any():
        raise UserError(
            f"backbone.weights: a token of this {kind} does not see those behind it, and so it is no encoder (valid: "
            "bert, roberta, deberta, ...; a decoder with language_model)"
        )
    used = {id(p) for p in (*_leaves(each.grad_fn), *net.get_input_embeddings().parameters())}
    return frozenset(name for name, p in net.named_parameters() if p.requires_grad and id(p) not in used)


def _leaves(node: Any) -> Iterator[Tensor]:
    """The tensors that a graph of automatic differentiation ends in."""
    open_, met = [node], {node}
    while open_:
        node = open_.pop()
        if hasattr(node, "variable"):
            yield node.variable
        new = {n for n, _ in node.next_functions if n is not None} - met
        open_ += new
        met |= new


def encoder_blocks(net: Any) -> list[nn.Module]:
    """The blocks of an encoder: its only outermost list of modules, or its only one of as many as it has layers.

    Raises:
        UserError: there is none, or several: the layers of one block then stand apart.
    """
    lists: dict[str, nn.ModuleList] = {}
    for name, module in net.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in lists):
            lists[name] = module
    layers = getattr(net.config, "num_hidden_layers", None)
    fit = [n for n, m in lists.items() if len(m) == layers] if len(lists) > 1 else list(lists)
    if len(fit) != 1:
        raise UserError(
            f"backbone.weights: the layers of this {net.config.model_type} stand in no single list of blocks (valid: "
            "bert, roberta, deberta, ...)"
        )
    return list(lists[fit[0]])


def width(config: Any) -> int:
    """Of whose multiples the length of a text must be, since the encoder would pad it within: windows of Longformer."""
    windows = getattr(config, "attention_window", None) or 1
    return windows if isinstance(windows, int) else max(windows)


def context(net: Any) -> float:
    """Tokens up to which an encoder has positions, and computes the same whatever else is in the batch; or infinity.

    RoBERTa and its kin count positions from behind that of padding. A BigBird reads longer batches in another way.
    """
    config, known = net.config, [torch.inf]
    if (most := getattr(config, "max_position_embeddings", None)) and most > 0:
        tables = [m for n, m in net.named_modules() if n.endswith("position_embeddings")]
        padding = [idx for m in tables if (idx := getattr(m, "padding_idx", None)) is not None]
        known.append(most - (padding[0] + 1 if padding else 0))
    if getattr(config, "attention_type", None) == "block_sparse":
        known.append((5 + 2 * config.num_random_blocks) * config.block_size)
    return min(known)


@contextmanager
def _watched(net: Any, watch: Callable[..., Tensor]) -> Iterator[None]:
    """Call `watch` on what the embedding of the tokens that are to be written puts out."""
    own = net.get_decoder().get_input_embeddings() if net.config.is_encoder_decoder else None
    handle = (own or net.get_input_embeddings()).register_forward_hook(watch)
    try:
        yield
    finally:
        handle.remove()
