"""Language models of transformers: decoders (Llama, GPT, ...) and encoder-decoders (T5, ...).

Source   Wolf et al., "Transformers: State-of-the-Art Natural Language Processing", EMNLP 2020 (demonstrations); the
         small ones are of the kinds of Touvron et al., arXiv:2302.13971, and Raffel et al., arXiv:1910.10683.

Prompts come as (B, 2, L) integers (see `streams/text.py`): row 0 token ids, row 1 classes to choose from, both filled
with -1 at the end. A decoder gets prompt and answer with the padding behind them, where no token sees it, so that what
is computed does not depend on it and needs no mask.

GPT-2's layers, transformers' Conv1D with weights (in, out), become linear ones with weights (out, in): the same
function, to rounding, and adapted as any other. In checkpoints their weights so are the transpose of transformers'.

Shapes: B samples of a batch, L tokens of the longest prompt, A of the longest answer, K answers scored, V ids of the
vocabulary, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from clplat.backbones import _families, _weights
from clplat.backbones._passes import joined, likelihood, rows_at, tree_mask
from clplat.backbones.answering import Answerer, read_ids
from clplat.backbones.base import Backbone, Head, Role, at_least_one, require
from clplat.data import llama2c
from clplat.data.tokens import HUB_FILES, find_folder, find_gguf, read_json
from clplat.errors import UserError
from clplat.stream import Actions, Answers

FILES = (*HUB_FILES, "*.safetensors", "*.safetensors.index.json")


class LanguageModel(Backbone):
    """A causal or encoder-decoder model of transformers, its vocabulary's logits included.

    Features are the last prompt token's for a decoder, the mean over the prompt's tokens for an encoder-decoder. The
    blocks are the decoder's, or the encoder's and then the decoder's.

    Args:
        net: as transformers makes it.
        length: L of the stream, tokens of its longest prompt.
    """

    needs_head = False
    reads_tokens = True
    shardable = True
    narrowable = True

    def __init__(self, net: Any, length: int) -> None:
        super().__init__()
        self.net, self.length = _weights.untransposed(net), length
        self.text: Any = net.config.get_text_config(decoder=True)
        last = None if net.config.is_encoder_decoder else net.get_output_embeddings().weight  # (V, D)
        self.embed_dim: int = self.text.hidden_size if last is None else last.shape[1]
        self.vocabulary: int = self.text.vocab_size
        self.seq2seq: bool = net.config.is_encoder_decoder
        if not self.one_pass(0):
            _families.check(net)
        self.residual = self.one_pass(0) and getattr(self.text, "do_layer_norm_before", True)
        self._start = _first_token(net) if self.seq2seq else -1  # asked for by encoder-decoders only
        inside = {id(block) for block in self.blocks}
        self._stems = tuple(f"{name}." for name, module in self.named_modules() if id(module) in inside)
        self._past = _families.read_past(self)
        self._real: list[Tensor] | None = None

    @property
    def blocks(self) -> list[nn.Module]:
        if self.seq2seq:
            return [
                block for part in (self.net.get_encoder(), self.net.get_decoder()) for block in _families.repeated(part)
            ]
        whole = self.text is self.net.config
        return _families.repeated(
            self.net.base_model if whole else self.net.get_decoder()
        )  # else: a part that reads images

    def layers(self, role: Role) -> dict[str, nn.Linear]:
        """As in `Backbone`; layers fused into one tensor, as those of the experts of a mixture, are refused.

        Raises:
            UserError: there are such layers in this role: adapting the others would leave them out unsaid.
        """
        for name, module in self.named_modules():
            if _families.fused(module) and self.role(name) == role:
                kind = type(module).__name__
                raise UserError(f"backbone: {name} ({role}) is a {kind}, which has no linear layers to adapt or change")
        return super().layers(role)

    def role(self, name: str) -> Role | None:
        return None if name in self._past else _families.role(name, self._stems)

    def positions(self) -> Sequence[Tensor | None] | None:
        return self._real

    def assemble(self, head: Head | None, answers: Answers | Actions | None) -> Answerer:
        if isinstance(answers, Actions):
            raise UserError(
                "backbone: language_model gives words, but this stream asks for actions (valid: actor_critic)"
            )
        if answers is not None:
            self._check(answers)
        return Answerer(self, answers)

    @property
    def context(self) -> float:
        """Tokens that it reads at once: of a prompt and its answer together, or of each in an encoder-decoder."""
        known = getattr(self.text, "max_position_embeddings", None) or torch.inf
        return known if self.seq2seq else min(known, _families.fixed_length(self.text))

    def _check(self, answers: Answers) -> None:
        if not len(answers.classes) and not answers.new_tokens:
            raise UserError("stream.answer: class, but language_model answers in words (valid: words)")
        if answers.vocabulary > self.vocabulary:
            raise UserError(
                f"stream.tokenizer: gives {answers.vocabulary} ids, but the model knows {self.vocabulary} (valid: the "
                f"model's own, or for weights random backbone.vocabulary ≥ {answers.vocabulary})"
            )
        context = getattr(self.text, "max_position_embeddings", None) or torch.inf
        longest = max(answers.classes.shape[1], answers.new_tokens)
        fixed = _families.fixed_length(self.text)
        if self.seq2seq and max(self.length, longest) > context:
            raise UserError(
                f"stream.max_length: prompts of {self.length} tokens or answers of {longest} do not fit into the "
                f"model's context of {context} (valid: ≤ {context})"
            )
        if not self.seq2seq and self.length + longest > min(context, fixed):
            what = "context" if context <= fixed else "context without side effects between the samples of a batch"
            raise UserError(
                f"stream.max_length: prompts of {self.length} tokens and answers of {longest} do not fit into the "
                f"model's {what} of {min(context, fixed)} (valid: ≤ {min(context, fixed) - longest})"
            )

    # --- passes -------------------------------------------------------------------------------------------------------

    @at_least_one
    def features(self, inputs: Tensor) -> Tensor:
        ids = read_ids(inputs)  # (B, P)
        real = ids >= 0
        if self.seq2seq:
            hidden = self._encode(ids).last_hidden_state  # (B, P, D)
            return (hidden * real.unsqueeze(2)).sum(1) / real.sum(1, keepdim=True).clamp(min=1)
        last = (real.sum(1) - 1).clamp(min=0)
        return self._pass(last.unsqueeze(1), ids)[0].squeeze(1)

    @at_least_one
    def answer_logits(self, prompts: Tensor, answers: Tensor) -> Tensor:
        """Logits (B, A, V) of each token of answers (B, A) given prompts (B, L) and the tokens before it."""
        if self.seq2seq:
            real = prompts >= 0
            self._note(real, answers >= 0)
            return self.net(
                input_ids=prompts.clamp(min=0), attention_mask=real.long(), decoder_input_ids=self._shifted(answers)
            ).logits
        ids, length = joined(prompts, answers)
        return self._pass(length - 1 + torch.arange(answers.shape[1], device=ids.device), ids)[1]

    @at_least_one
    def answer_scores(self, prompts: Tensor, answers: Tensor) -> Tensor:
        """Log-likelihood (B, K) of each of answers (B, K, A), padded with -1, given prompts (B, L).

        A decoder of `ONE_PASS` reads the prompt once, with all answers behind it, each of which sees the prompt and
        itself; another, or one whose attention window is shorter, reads it anew with each answer.
        """
        rows, count, width = answers.shape
        if self.seq2seq:
            real = prompts >= 0
            self._note(real, answers.flatten(0, 1) >= 0)
            read = self._encode(prompts)
            states = read.last_hidden_state.repeat_interleave(count, 0)
            logits = self.net(
                encoder_outputs=type(read)(last_hidden_state=states),
                attention_mask=real.repeat_interleave(count, 0).long(),
                decoder_input_ids=self._shifted(answers.flatten(0, 1)),
            ).logits
            return likelihood(logits.unflatten(0, (rows, count)), answers)
        length, longest = (prompts >= 0).sum(1, keepdim=True), prompts.shape[1]
        if not self.one_pass(longest + width):
            logits = self.answer_logits(prompts.repeat_interleave(count, 0), answers.flatten(0, 1))
            return likelihood(logits.unflatten(0, (rows, count)), answers)
        fed = answers[:, :, :-1]  # a last token predicts nothing
        ids = torch.cat([prompts, fed.flatten(1)], 1)
        step = torch.arange(width - 1, device=ids.device).repeat(count)  # (K · (A − 1),) place within its answer
        before = torch.arange(longest, device=ids.device)
        places = torch.cat([before.expand(rows, -1), length + step], 1)
        mask = tree_mask(length, longest, count, width - 1)
        behind = torch.arange(longest, ids.shape[1], device=ids.device).expand(rows, -1)
        _, logits = self._pass(torch.cat([length - 1, behind], 1), ids, attention_mask=mask, position_ids=places)
        first, later = logits[:, None, :1].expand(-1, count, -1, -1), logits[:, 1:].unflatten(1, (count, width - 1))
        return likelihood(first, answers[:, :, :1]) + likelihood(later, answers[:, :, 1:])

    def one_pass(self, tokens: int) -> bool:
        """Whether answers are read in one pass where prompt and answer have so many tokens at most."""
        known = not self.seq2seq and self.text.model_type in _families.ONE_PASS
        return known and tokens <= _families.sees(self.text)

    @torch.no_grad()
    @at_least_one
    def generate(self, prompts: Tensor, tokens: int, end: int) -> Tensor:
        """Greedy answers (B, tokens) to prompts (B, L), filled with -1 from the end token on."""
        from transformers import GenerationConfig

        real, width = prompts >= 0, prompts.shape[1]
        if not (self.seq2seq or self.one_pass(0)):
            return self._written(prompts, tokens, end)
        if not self.seq2seq:  # transformers wants the padding in front
            place = torch.arange(width, device=prompts.device) - (width - real.sum(1, keepdim=True))
            prompts = prompts.gather(1, place.clamp(min=0)).masked_fill(place < 0, -1)
            real = place >= 0
        how = GenerationConfig(
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=end,
            decoder_start_token_id=self._start if self.seq2seq else None,
        )
        # What the weights bring (forced tokens, beams, penalties) would be put in where `how` says nothing.
        brought, self.net.generation_config = self.net.generation_config, GenerationConfig()
        try:
            found = self.net.generate(
                input_ids=prompts.clamp(min=0).long(), attention_mask=real.long(), generation_config=how
            )
        finally:
            self.net.generation_config = brought
        found = found[:, 1 if self.seq2seq else width :]
        found = found.masked_fill((found == end).long().cumsum(1) > 0, -1)
        return nn.functional.pad(found, (0, tokens - found.shape[1]), value=-1)

    def _written(self, prompts: Tensor, tokens: int, end: int) -> Tensor:
        """As `generate`, by a whole pass a token, which takes no cache and no padding in front."""
        written = prompts.new_full((len(prompts), tokens), -1).long()
        open_ = torch.ones(len(prompts), dtype=torch.bool, device=prompts.device)
        for step in range(tokens):
            ids, length = joined(prompts, written[:, : step + 1])
            best = self._pass(length - 1 + step, ids)[1][:, 0].argmax(1)
            open_ &= best != end
            written[:, step] = best.masked_fill(~open_, -1)
            if not bool(open_.any()):
                break
        return written

    def _pass(
        self, places: Tensor, ids: Tensor, attention_mask: Tensor | None = None, **more: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What the last layer is given (B, n, D) and the logits (B, n, V), at places (B, n) of ids (B, P).

        Logits are the model's own, scaled as its family does; its last layer is computed at those places only.
        """
        self._note(ids >= 0)
        if attention_mask is not None:
            seen = torch.zeros(attention_mask.shape, dtype=self.net.dtype, device=ids.device)
            more["attention_mask"] = seen.masked_fill(~attention_mask, torch.finfo(seen.dtype).min)
        given: list[Tensor] = []

        def only(_: nn.Module, arguments: tuple[Tensor]) -> Tensor:
            given.append(rows_at(arguments[0], places))
            return given[-1]

        handle = self.net.get_output_embeddings().register_forward_pre_hook(only)
        try:
            logits = self.net(input_ids=ids.clamp(min=0).long(), use_cache=False, **more).logits
        finally:
            handle.remove()
        return given[-1], logits

    def _encode(self, prompts: Tensor) -> Any:
        """What an encoder puts out, hidden states (B, L, D) first."""
        return self.net.get_encoder()(input_ids=prompts.clamp(min=0), attention_mask=(prompts >= 0).long())

    def _shifted(self, answers: Tensor) -> Tensor:
        """What a decoder is fed to put out answers (b, A)."""
        start = answers.new_full((len(answers), 1), self._start)
        return torch.cat([start, answers[:, :-1].clamp(min=0)], 1)

    def _note(self, *real: Tensor) -> None:
        """Remember, for `positions`, which tokens are real in the encoder and the decoder, or in the decoder."""
        counts = [len(self.blocks)]
        if self.seq2seq:
            counts = [len(_families.repeated(part)) for part in (self.net.get_encoder(), self.net.get_decoder())]
        self._real = [mask for mask, count in zip(real, counts, strict=True) for _ in range(count)]


def language_model(
    input_shape: tuple[int, ...],
    weights: str = "random",
    config: str | None = None,
    family: Literal["llama", "t5"] = "llama",
    dim: int = 64,
    depth: int = 2,
    heads: int = 4,
    vocabulary: int = 512,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> Backbone:
    """Any causal or encoder-decoder language model of transformers; or a small one from nothing.

    Args:
        input_shape: (2, tokens of the longest prompt), as streams of text have it.
        weights: "random"; or a folder with config.json and .safetensors files, as transformers or llama2.c lay it out,
            or with one .gguf file of a kind that transformers reads (needs clplat[gguf]), a name below
            weights/ of the data root, or a name on the hub (its cache first).
        config: folder or hub name whose config.json gives the structure of random weights; null: the six below.
        family: of a small model: llama is a decoder, t5 an encoder-decoder.
        dim: features, > 0 and a multiple of 2 · heads.
        depth: number of blocks (t5: of the encoder and of the decoder), > 0.
        heads: of attention, > 0.
        vocabulary: token ids, > 0.
        dtype: of the weights; bfloat16 for large frozen ones.

    Raises:
        UserError: options out of range, an unknown structure, weights that are damaged or do not fit.
        MissingError: the weights are neither here nor reachable; says which file to put where.
    """
    if len(input_shape) != 2 or input_shape[0] != 2:
        raise UserError(f"backbone: language_model takes text (2, tokens), but the stream's inputs are {input_shape}")
    kind = getattr(torch, dtype)
    if weights != "random":
        return LanguageModel(_pretrained(find_folder(weights, "backbone.weights", FILES), kind), input_shape[1])
    if config is not None:
        return LanguageModel(_from_config(_config(find_folder(config, "backbone.config", FILES)), kind), input_shape[1])
    require("heads", heads, heads > 0, "> 0")
    require("dim", dim, dim > 0 and dim % (2 * heads) == 0, f"> 0 and a multiple of 2 · heads = {2 * heads}")
    require("depth", depth, depth > 0, "> 0")
    require("vocabulary", vocabulary, vocabulary > 0, "> 0")
    return LanguageModel(_from_config(_small(family, dim, depth, heads, vocabulary), kind), input_shape[1])


def _small(family: str, dim: int, depth: int, heads: int, vocabulary: int) -> Any:
    import transformers

    if family == "llama":
        return transformers.LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=dim,
            intermediate_size=4 * dim,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            tie_word_embeddings=True,
        )
    require("family", family, family == "t5", "llama or t5")
    t5: Any = transformers.T5Config
    return t5(
        vocab_size=vocabulary,
        d_model=dim,
        d_kv=dim // heads,
        d_ff=4 * dim,
        num_layers=depth,
        num_heads=heads,
        decoder_start_token_id=0,
    )


def _config(folder: Path) -> Any:
    """transformers' configuration of a folder."""
    plain = read_json(folder / "config.json")
    if llama2c.is_ours(plain):
        return llama2c.to_config(plain)
    return _weights.read_config(folder)


def _auto(config: Any) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def _from_config(config: Any, dtype: torch.dtype) -> Any:
    try:
        return _auto(config).from_config(config, dtype=dtype)
    except ValueError as error:
        raise UserError(f"backbone.config: {config.model_type} is no language model of transformers") from error


def _pretrained(folder: Path, dtype: torch.dtype) -> Any:
    """The model in a folder; every tensor of it must be there."""
    if (gguf := find_gguf(folder, "backbone.weights")) is not None:
        known = _weights.read_config(folder, gguf)
        return _weights.read_folder(_auto(known), folder, known, dtype, gguf=gguf)
    config, plain = _config(folder), read_json(folder / "config.json")
    if llama2c.is_ours(plain):
        (file,) = _weights.whole_files(folder)[:1]
        net = _from_config(config, dtype)
        _weights.fit(net, llama2c.to_state(_weights.read(str(file)), plain), str(file), lambda _: False)
        return net
    return _weights.read_folder(_auto(config), folder, config, dtype)


def _first_token(net: Any) -> int:
    """The token that a decoder of an encoder-decoder is started with, as `generate` of transformers finds it."""
    places = (net.config, net.generation_config, net.config.get_text_config(decoder=True))
    keys = ("decoder_start_token_id", "bos_token_id")
    found = [getattr(place, key, None) for key in keys for place in places]
    if not (known := [f for f in found if f is not None]):
        raise UserError("backbone.weights: config.json lacks decoder_start_token_id (valid: the decoder's first token)")
    return known[0]
