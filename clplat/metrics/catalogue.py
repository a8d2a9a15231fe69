"""What every metric of `summary.json` is. Imports neither torch nor numpy: `clplat list metrics` reads this."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Group = Literal["metrics", "representation", "cost"]


@dataclass(frozen=True)
class MetricInfo:
    """Facts of one metric.

    Args:
        group: where it stands in summary.json.
        summary: one line.
        formula: in the symbols of docs/metrics.md.
        source: paper, or that it is this platform's own.
        lowest: least possible value; None is unbounded.
        highest: greatest possible value; None is unbounded.
        higher_is_better: None where neither end is good as such.
        kinds: of experience that it needs; empty is any.
    """

    group: Group
    summary: str
    formula: str
    source: str
    lowest: float | None
    highest: float | None
    higher_is_better: bool | None
    kinds: tuple[str, ...] = ()


_LEARN, _FORGET, _ADAPT, _INTERACT = ("learn",), ("forget",), ("adapt",), ("interact",)
_GEM = "Lopez-Paz and Ranzato, NeurIPS 2017, arXiv:1706.08840"
_RWALK = "Chaudhry et al., ECCV 2018, arXiv:1801.10112"
_MER = "Riemer et al., ICLR 2019, arXiv:1810.11910"
_GAP = "De Lange, van de Ven and Tuytelaars, ICLR 2023, arXiv:2205.13452"
_GSLORA = "Zhao et al., CVPR 2024, arXiv:2403.11530"
_WSRL = "Zhou et al., ICLR 2025, arXiv:2412.07762"
_CW = "Wołczyk et al., NeurIPS 2021, arXiv:2105.10919"
_ZSCL = "Zheng et al., ICCV 2023, arXiv:2303.06628"
_ICARL = "Rebuffi et al. (iCaRL), CVPR 2017, arXiv:1611.07725"
_PRETRAINING = "Yıldız et al., TMLR 2025, arXiv:2402.17400"
_LUO = "measuring before and after: Luo et al., 2023, arXiv:2308.08747"
_INTRUDERS = "Shuttleworth et al., NeurIPS 2025, arXiv:2410.21228"
_OWN = "this platform"

METRICS: dict[str, MetricInfo] = {
    "average_accuracy": MetricInfo(
        "metrics", "mean over test sets of the accuracy on everything learned and not erased, at the end",
        "A_n = mean over j ∈ C_n of R[n, j]", _GEM, 0, 1, True, _LEARN),
    "average_incremental_accuracy": MetricInfo(
        "metrics", "average accuracy after each learn experience, averaged",
        "mean over rows i after learn experiences of A_i, every test set with equal weight",
        f"A_i: {_GEM}; the mean over rows: {_OWN}", 0, 1, True, _LEARN),
    "sample_accuracy": MetricInfo(
        "metrics", "accuracy over all test samples of what was learned and not erased, at the end",
        "S_n = Σ_j N_j R[n, j] / Σ_j N_j over j ∈ C_n, N_j the test samples of j", _ICARL, 0, 1, True, _LEARN),
    "average_incremental_sample_accuracy": MetricInfo(
        "metrics", "accuracy over all test samples met so far, after each learn experience, averaged",
        "mean over rows i after learn experiences of S_i, every test sample with equal weight", _ICARL,
        0, 1, True, _LEARN),
    "forgetting": MetricInfo(
        "metrics", "best earlier accuracy minus the last, over past test sets",
        "mean over past j of (max over 1 ≤ l < n of R[l, j]) − R[n, j]", _RWALK, -1, 1, False, _LEARN),
    "backward_transfer": MetricInfo(
        "metrics", "last accuracy minus that just after learning, over past test sets",
        "mean over past j of R[n, j] − R[j + 1, j]", _GEM, -1, 1, True, _LEARN),
    "forward_transfer": MetricInfo(
        "metrics", "accuracy just before learning minus that of the untrained model",
        "mean over j > 0 of R[j, j] − R[0, j]", _GEM, -1, 1, True, _LEARN),
    "transfer": MetricInfo(
        "metrics", "accuracy on each test set before it is learned, over the rows after training began",
        "mean over j > 0 of mean over 1 ≤ i ≤ j of R[i, j]", _ZSCL, 0, 1, True, _LEARN),
    "average": MetricInfo(
        "metrics", "accuracy over all rows after training began and all test sets, learned yet or not",
        "mean over j of mean over i ≥ 1 of R[i, j]", _ZSCL, 0, 1, True, _LEARN),
    "last": MetricInfo(
        "metrics", "accuracy over all test sets in the last row",
        "mean over j of R[n, j]", _ZSCL, 0, 1, True, _LEARN),
    "plasticity": MetricInfo(
        "metrics", "learning accuracy: accuracy on each test set just after learning it",
        "LA(R) = mean over j of R[j + 1, j]", _MER, 0, 1, True, _LEARN),
    "relative_plasticity": MetricInfo(
        "metrics", "learning accuracy as a share of the reference run's",
        "LA(R) / LA(R*)", f"{_MER}; the ratio: {_OWN}", 0, None, True, _LEARN),
    "stability": MetricInfo(
        "metrics", "remembering: one minus the mean loss on past test sets, over all rows",
        "1 − |min(B, 0)|, B = mean over j and i > j + 1 of R[i, j] − R[j + 1, j]",
        "Díaz-Rodríguez et al., 2018, arXiv:1810.13166 (REM)", 0, 1, True, _LEARN),
    "intransigence": MetricInfo(
        "metrics", "learning accuracy of the reference run (a joint one) minus this run's",
        "LA(R*) − LA(R)", _RWALK, -1, 1, False, _LEARN),
    "average_anytime_accuracy": MetricInfo(
        "metrics", "mean over evaluations while learning of the mean accuracy on what has been met",
        "mean over v of mean over j ≤ k_v of a_v[j]", "Caccia et al., ICLR 2022, arXiv:2104.05025", 0, 1, True, _LEARN),
    "worst_case_accuracy": MetricInfo(
        "metrics", "final accuracy on the newest test set and minima on the past ones (WC-ACC)",
        "(1 / k) R[n, newest] + (1 − 1 / k) minimum_accuracy, k test sets", _GAP, 0, 1, True, _LEARN),
    "minimum_accuracy": MetricInfo(
        "metrics", "lowest accuracy on each past test set since its experience ended (min-ACC)",
        "mean over past j of min over evaluations after j of a[j]", _GAP, 0, 1, True, _LEARN),
    "stability_gap": MetricInfo(
        "metrics", "depth of the drop in past accuracy that comes back within an experience",
        "mean over k and past j of max(0, min(R[k, j], R[k + 1, j]) − min over v in k of a_v[j])",
        f"phenomenon: {_GAP}; number: {_OWN}", 0, 1, False, _LEARN),
    "forget_accuracy": MetricInfo(
        "metrics", "accuracy on the erased data just after each request",
        "FA = mean over requests f of R[f + 1, f]",
        "Fan et al., ICLR 2024, arXiv:2310.12508; Liu et al., CoLLAs 2022, arXiv:2203.12817", 0, 1, False, _FORGET),
    "retain_accuracy": MetricInfo(
        "metrics", "accuracy on what was learned and not erased, just after each request",
        "RA = mean over requests of (hits on learned − hits on erased) / (samples learned − samples erased)",
        _GSLORA, 0, 1, True, _FORGET),
    "forget_drop": MetricInfo(
        "metrics", "accuracy on the erased data before an unbroken sequence of requests minus after each",
        "mean over requests f of max(0, R[b_f, f] − R[f + 1, f])", _GSLORA, 0, 1, True, _FORGET),
    "h_mean": MetricInfo(
        "metrics", "harmonic mean of retain accuracy and drop; reference: the model before the sequence of requests",
        "mean over requests of 2 RA Drop / (RA + Drop)", _GSLORA, 0, 1, True, _FORGET),
    "h_step": MetricInfo(
        "metrics", "harmonic mean of retain accuracy and drop; reference: the model just before each request",
        "mean over requests f of 2 RA D / (RA + D), D = max(0, R[f, f] − R[f + 1, f])", f"{_OWN}, after {_GSLORA}",
        0, 1, True, _FORGET),
    "retention_loss": MetricInfo(
        "metrics", "accuracy that a request costs on what was learned and not erased",
        "mean over requests f and test sets g not erased of a[f, g] − a[f + 1, g], of what f leaves of g",
        "Liu et al., CoLLAs 2022, arXiv:2203.12817, over one request", -1, 1, False, _FORGET),
    "relapse": MetricInfo(
        "metrics", "accuracy that erased data regain later without being taught again",
        "mean over requests f of (max over i > f + 1 of R[i, f]) − R[f + 1, f]", "UnCLe, 2025, arXiv:2509.17530",
        -1, 1, False, _FORGET),
    "online_error": MetricInfo(
        "metrics", "error of predictions made as unlabelled data arrive, mean over experiences",
        "mean over adapt experiences of 1 − correct / seen", "Wang et al., CVPR 2022, arXiv:2203.13591",
        0, 1, False, _ADAPT),
    "last_round_error": MetricInfo(
        "metrics", "online error in the last round of a stream that comes back to what it had",
        "e_R = mean over adapt experiences of round R of 1 − correct / seen",
        "Wang et al., CVPR 2022, arXiv:2203.13591", 0, 1, False, _ADAPT),
    "round_drift": MetricInfo(
        "metrics", "online error of the last round minus that of the first: above 0 adaptation does lasting harm",
        "e_R − e_1", f"rounds: Wang et al., CVPR 2022, arXiv:2203.13591; number: {_OWN}", -1, 1, False, _ADAPT),
    "hardest_error": MetricInfo(
        "metrics", "online error where the severity is highest",
        "mean over adapt experiences of the highest severity of 1 − correct / seen",
        "Döbler et al., CVPR 2023, arXiv:2211.13081", 0, 1, False, _ADAPT),
    "source_accuracy": MetricInfo(
        "metrics", "accuracy on clean test data after adapting; where batch statistics normalise, those of 512 samples",
        "mean over the clean test sets j of R[n, j]", "Niu et al., ICML 2022, arXiv:2204.02610", 0, 1, True, _ADAPT),
    "source_drop": MetricInfo(
        "metrics", "accuracy on clean test data before adapting minus after",
        "mean over the clean test sets j of R[f, j] − R[n, j], f the row before the first adapt experience",
        "Niu et al., ICML 2022, arXiv:2204.02610", -1, 1, False, _ADAPT),
    "normalized_return": MetricInfo(
        "metrics", "last return between the random policy's (0) and the expert's (1), not clipped",
        "S = (G − G_random) / (G_expert − G_random)", "Fu et al., 2020, arXiv:2004.07219", None, None, True, _INTERACT),
    "initial_dip": MetricInfo(
        "metrics", "largest loss of normalised return below that on entry, in the first half of the experience",
        "max(0, S_before − min over t ≤ T/2 of S_t)", f"drop: {_WSRL}; window: {_OWN}", 0, None, False, _INTERACT),
    "recovery_fraction": MetricInfo(
        "metrics", "share of the experience gone before the return is back at that on entry; 1 if never",
        "t_r / T, t_r the first evaluation after the dip with S ≥ S_before", f"recovery: {_WSRL}; number: {_OWN}",
        0, 1, False, _INTERACT),
    "dip_area": MetricInfo(
        "metrics", "loss of normalised return below that on entry, mean over the whole experience",
        "(1 / T) ∫ max(0, S_before − S_t) dt, trapezoidal", f"drop: {_WSRL}; area: {_OWN}", 0, None, False, _INTERACT),
    "steps_to_90": MetricInfo(
        "metrics", "environment steps to the first normalised return of 0.9",
        "min t with S_t ≥ 0.9", _OWN, 0, None, False, _INTERACT),
    "probe_td_error": MetricInfo(
        "metrics", "largest mean TD error on recorded transitions kept for measurement, while acting",
        "max over t of mean |Q(s, a) − y|", _WSRL, 0, None, False, _INTERACT),
    "probe_return_error": MetricInfo(
        "metrics", "mean distance of the values from the recorded episodes' returns, at the end, in the agent's units",
        "mean |Q(s, a) − G|, G the discounted sum of rewards to the episode's end", _WSRL, 0, None, False, _INTERACT),
    "final_return": MetricInfo(
        "metrics", "normalised return in all environments at the end, of a stream that has several",
        "mean over j of G[n, j]", _CW, None, None, True, _INTERACT),
    "return_forgetting": MetricInfo(
        "metrics", "normalised return lost between the end of an environment and the end; the last one counts with 0",
        "mean over j of G[j, j] − G[n, j]", _CW, None, None, False, _INTERACT),
    "return_forward_transfer": MetricInfo(
        "metrics", "normalised area under the returns beyond that of learning each environment alone (key `reference`)",
        "mean over j of (A_j − A*_j) / (1 − A*_j)", _CW, None, 1, True, _INTERACT),
    "general_accuracy": MetricInfo(
        "metrics", "accuracy on sets that no experience learns, at the end (`stream.general`)",
        "mean over sets j of A[n, j]", f"{_LUO}; number: {_OWN}", 0, 1, True),
    "general_drop": MetricInfo(
        "metrics", "accuracy on sets that no experience learns before the first minus at the end",
        "mean over sets j of A[0, j] − A[n, j]", f"{_LUO}; number: {_OWN}", -1, 1, False),
    "general_perplexity": MetricInfo(
        "metrics", "perplexity of texts that no experience learns, at the end (`stream.general_texts`)",
        "exp(mean over texts j of ln P[n, j])", _OWN, 1, None, False),
    "general_perplexity_ratio": MetricInfo(
        "metrics", "perplexity of texts that no experience learns at the end over that before the first",
        "exp(mean over texts j of ln (P[n, j] / P[0, j]))", _OWN, 0, None, False),
    "zero_shot_perplexity": MetricInfo(
        "metrics", "perplexity of the domains of a stream of whole texts (`corpora`) before any training",
        "ZS = mean over j of P[0, j]", _PRETRAINING, 1, None, False, _LEARN),
    "continual_perplexity": MetricInfo(
        "metrics", "perplexity of each domain just after learning it",
        "CPT = mean over j of P[j + 1, j]", _PRETRAINING, 1, None, False, _LEARN),
    "last_perplexity": MetricInfo(
        "metrics", "perplexity of all domains at the end",
        "LC = mean over j of P[n, j]", _PRETRAINING, 1, None, False, _LEARN),
    "perplexity_forgetting": MetricInfo(
        "metrics", "logarithm of the last perplexity over that just after learning, over past domains",
        "mean over past j of ln (P[n, j] / P[j + 1, j])", f"LC and CPT: {_PRETRAINING}; number: {_OWN}", None, None,
        False, _LEARN),
    "perplexity_backward_transfer": MetricInfo(
        "metrics", "perplexity just after learning minus the last, over past domains",
        "mean over past j of P[j + 1, j] − P[n, j]", f"LC and CPT: {_PRETRAINING}; number: {_OWN}", None, None, True,
        _LEARN),
    "perplexity_forward_transfer": MetricInfo(
        "metrics", "perplexity before any training minus that after other domains, over those not learned yet",
        "mean over i ≥ 1 of mean over j ≥ i of P[0, j] − P[i, j]", f"ZS: {_PRETRAINING}; number: {_OWN}", None, None,
        True, _LEARN),
    "dormant_fraction": MetricInfo(
        "representation", "share of units whose mean activity is at most 0.025 of their layer's mean",
        "unit dormant if E|h_u| / (mean over the layer of E|h|) ≤ τ, τ = 0.025",
        "Sokar et al., ICML 2023, arXiv:2302.12902", 0, 1, False),
    "effective_rank": MetricInfo(
        "representation", "effective rank of the feature matrix (n, D), not centred",
        "exp(−Σ p_k ln p_k), p_k = σ_k / Σ σ", "Roy and Vetterli, EUSIPCO 2007", 0, None, True),
    "weight_norm": MetricInfo(
        "representation", "Euclidean norm of all parameters of the model",
        "√(Σ θ²)", "Lyle et al., ICML 2023, arXiv:2303.01486", 0, None, None),
    "gradient_norm": MetricInfo(
        "representation", "Euclidean norm of the gradient before clipping, mean over every 50th step",
        "mean over steps of √(Σ g²)", "Abbas et al., CoLLAs 2023, arXiv:2303.07507", 0, None, None),
    "intruder_dimensions": MetricInfo(
        "representation", "leading singular directions of the layers' weights that are none of those the run began with"
        " (`loop.diagnostics`)",
        "Σ over matrices of #{j ≤ 10: max_i |u_i(W_0) · u_j(W)| < 0.5}",
        _INTRUDERS, 0, None, False),
    "new_intruder_dimensions": MetricInfo(
        "representation", "the same against the weights before the experience (`loop.diagnostics`)",
        "Σ over matrices of #{j ≤ 10: max_i |u_i(W_before) · u_j(W)| < 0.5}", _INTRUDERS, 0, None, False),
    "tuning_contribution": MetricInfo(
        "representation", "what a language model's blocks add to a prompt's last token through what was learned since "
        "the run began, mean over the experience's held-out prompts (TuCo; `loop.diagnostics`)",
        "mean of ‖F‖₁ / (‖P‖₁ + ‖F‖₁), P = Σ_l f_0(x_l), F = Σ_l (f − f_0)(x_l)",
        "Nuti et al., ICML 2025, arXiv:2506.23423", 0, 1, None),
    "train_seconds": MetricInfo(
        "cost", "seconds in training; evaluation, checkpoints and the warm-up of the process excluded", "Σ", _OWN,
        0, None, False),
    "eval_seconds": MetricInfo("cost", "seconds in evaluation", "Σ", _OWN, 0, None, False),
    "save_seconds": MetricInfo("cost", "seconds that checkpoints held up the loop", "Σ", _OWN, 0, None, False),
    "samples_per_second": MetricInfo(
        "cost", "training samples per second of training, over all processes", "samples / train_seconds",
        _OWN, 0, None, True),
    "warmup_seconds": MetricInfo(
        "cost", "seconds of what torch does once a process, before the first run's training; 0 in later runs", "t",
        _OWN, 0, None, False),
    "first_step_seconds": MetricInfo(
        "cost", "seconds from the start of the run to the end of its first step", "t", _OWN, 0, None, False),
    "peak_rss_bytes": MetricInfo(
        "cost", "largest resident memory of a process", "max", _OWN, 0, None, False),
    "peak_device_bytes": MetricInfo(
        "cost", "largest memory allocated on an accelerator", "max", _OWN, 0, None, False),
    "trainable_parameters": MetricInfo(
        "cost", "numbers that receive gradients, at the end", "Σ |θ|", _OWN, 0, None, False),
    "stored_bytes": MetricInfo(
        "cost", "bytes that the strategy keeps between experiences beyond the model: memories, copies, statistics",
        "bytes of its state − bytes of the model", "after Díaz-Rodríguez et al., 2018, arXiv:1810.13166",
        0, None, False),
    "train_flops": MetricInfo(
        "cost", "floating-point operations of training: those of a measured step times the steps",
        "Σ steps × (2 per multiply-add, forward and backward, matrix products and convolutions)",
        "torch.utils.flop_counter", 0, None, False),
}  # fmt: skip

_HEAD = """# Metrics

Every quantity of `summary.json`, generated from `clplat/metrics/catalogue.py`. The functions that compute them, with
shapes, ranges and worked examples, are in `clplat/metrics/`. One that could not be measured is null, and `why_null`
gives the reason.

**Symbols.** R is the accuracy matrix: row 0 before any training, row i after i experiences, column j the test set of
experience j (from 0), so that R[j + 1, j] is the accuracy just after learning it. n experiences have finished. C_i are
the test sets of learn experiences met by row i and not erased as a whole; of one erased in part, what is left counts.
"Past" test sets have an experience after their own; those erased, even in part, are left out wherever two rows are
compared. R* is the matrix of the reference run (key `reference`). v is an evaluation inside an experience k_v
(`loop.eval_every`), a_v[j] its accuracy on test set j. b_f is the row before the first of the unbroken sequence of
requests that f belongs to. S are normalised returns, T the last environment step evaluated. G[i, j] is the normalised
return in environment j after acting in i of n environments, A_j the mean of S over the steps in j, A*_j that of the
reference run (one of an agent with `restart`, which begins anew in each).

A[i, j] is the accuracy on set j of those that no experience learns, P[i, j] the perplexity of text j of those, in row i
as R has it. Perplexity is exp(−Σ ln p / tokens), over all tokens of a text that are predicted. Of a stream of whole
texts R[i, j] is 1 / P[i, j], P[i, j] being the perplexity of the test set of domain j.

Rows of every kind count: accuracy that an adaptation or a request costs on what was learned is forgetting.
"""

_TITLES = {
    "metrics": "## `metrics`: one number a run",
    "representation": "## `representation`: one number an experience",
    "cost": "## `cost`: one number a run",
}


def to_markdown() -> str:
    """The page docs/metrics.md."""
    parts = [_HEAD]
    for group, title in _TITLES.items():
        parts.append(f"\n{title}\n\n| name | what | formula | range | better | kinds | source |\n"
                     "|---|---|---|---|---|---|---|\n")  # fmt: skip
        for name, info in METRICS.items():
            if info.group == group:
                better = {True: "higher", False: "lower", None: "—"}[info.higher_is_better]
                cells = [f"`{name}`", info.summary, info.formula, _range(info), better,
                         ", ".join(info.kinds) or "any", info.source]  # fmt: skip
                parts.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |\n")
    return "".join(parts)


def _range(info: MetricInfo) -> str:
    low = "(−∞" if info.lowest is None else f"[{info.lowest:g}"
    high = "∞)" if info.highest is None else f"{info.highest:g}]"
    return f"{low}, {high}"
