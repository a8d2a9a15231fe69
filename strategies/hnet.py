"""HNET: a network generates a task's weights from its embedding, and is held to what it generated for the others.

Source   von Oswald, Henning, Grewe, Sacramento, "Continual learning with hypernetworks", ICLR 2020, arXiv:1906.00695,
         equations 1 to 3; values for no lookahead: Henning et al., "Posterior meta-replay", NeurIPS 2021.
Checked  against chrhenning/hypercl and chrhenning/posterior_replay_cl (both Apache-2.0): the sizes that follow from
         their settings.
    ω_t = h(e_t; θ) = (g([e_t; c_1]; θ), ..., g([e_t; c_K]; θ))                          one piece of ω for each c_k
    loss = CE(f(x; ω_t), y) + β/(t−1) Σ_{j<t} ‖ω*_j − h(e_j; θ + Δθ)‖²
Differs  one optimizer for θ and e_t, which have the same rate in theirs. A parameter that starts constant is generated
         as the difference from that constant (the gain of a normalisation starts at 1). The inference network learns
         from a memory of real samples, where the paper replays those of a generative model. With lookahead, clipping
         applies to the first gradient only.
         Defaults are no column of either source: β and the rate are hypercl's, chunk, hidden widths and no lookahead of
         the order of posterior_replay_cl's, embeddings of 32 ours. The paper's, for Split MNIST, are `lookahead: true,
         embedding: 96, chunk: 42000, chunk_embedding: 96, hidden: [10, 10]` (experiment hnet/split_mnist). Adapters
         (`rank`) are an extension, and start at the frozen backbone.
"""

from __future__ import annotations

from typing import Literal

from clplat import require
from clplat.components.hypernetwork import Chunked
from clplat.strategies._hypernet import Hypernet


class HNet(Hypernet):
    """Task-conditioned hypernetwork in chunks. All rows of the head are generated from the start, whatever its kind.

    Args:
        chunk: numbers of ω that g makes at a time, ≥ 1.
        chunk_embedding: numbers of each c_k, ≥ 0.
        hidden: widths of g's hidden layers; empty makes it linear.
        activation: of g.
        init: of g's layers: default (PyTorch's), or xavier with zero biases.
    """

    paper = "arXiv:1906.00695"

    def __init__(
        self,
        *,
        chunk: int = 8000,
        chunk_embedding: int = 32,
        hidden: list[int] = [100, 100],  # noqa: B006
        activation: Literal["relu", "elu"] = "relu",
        init: Literal["default", "xavier"] = "default",
        **base,
    ):
        super().__init__(**base)
        require("chunk", chunk, chunk >= 1, "≥ 1")
        require("chunk_embedding", chunk_embedding, chunk_embedding >= 0, "≥ 0")
        require("hidden", hidden, all(width >= 1 for width in hidden), "widths ≥ 1")
        require("activation", activation, activation in ("relu", "elu"), "relu or elu")
        require("init", init, init in ("default", "xavier"), "default or xavier")
        size, from_zero = self.target.size, self.target.rank > 0
        self._generate(Chunked(size, self.embedding, chunk, chunk_embedding, hidden, activation, init, from_zero))
