"""Ranks over streams as a reader meets them: section of the page, diagram, and files for papers."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from clplat.report.parts import table
from clplat.report.ranks import Ranking
from clplat.report.spec import Figure, Ranks
from clplat.report.tables import csv_text, latex_text, title_of


def title(ranking: Ranking) -> str:
    """What is ranked."""
    words = title_of(ranking.metric).rstrip(" ↑↓")
    return f"Ranks by {words} over streams" + (" (validation data)" if ranking.validation else "")


def diagram(ranking: Ranking, index: int) -> Figure | None:
    """The critical-difference diagram; None where nothing could be told, which a picture of bars would hide."""
    if not ranking.can_tell:
        return None
    length = ranking.critical_difference if ranking.differs else None
    panel = Ranks(title(ranking), ranking.strategies, ranking.means, ranking.alike, length)
    caption = (f"Mean rank of each strategy over {len(ranking.streams)} streams; 1 is the best. A bar joins strategies "
               "that are not told apart.")  # fmt: skip
    means = ", ".join(f"{s} {m:.2f}" for s, m in zip(ranking.strategies, ranking.means, strict=True))
    slug = "ranks" if index == 0 else f"ranks-{index + 1}"
    return Figure(slug, title(ranking), caption, f"Mean ranks: {means}. {ranking.said()}", [panel])


def sections(rankings: Sequence[Ranking]) -> str:
    """A table of ranks for each ranking, and what can be told of them."""
    return "".join(_section(ranking) for ranking in rankings)


def _section(ranking: Ranking) -> str:
    rows = [[escape(stream), *(f"{r:g}" for r in own)]
            for stream, own in zip(ranking.streams, ranking.ranks, strict=True)]  # fmt: skip
    rows.append(["mean", *(f"<b>{m:.2f}</b>" for m in ranking.means)])
    shown = table(
        "Rank of each strategy in each stream, 1 the best", ["Stream", *map(escape, ranking.strategies)], rows
    )
    left = f"<p>Left out, since not every stream has them: {escape(', '.join(ranking.left_out))}.</p>"
    return (f'<section class="card"><h3>{escape(title(ranking))}</h3><p>{escape(ranking.said())}</p>{shown}'
            f"{left if ranking.left_out else ''}</section>")  # fmt: skip


def files(rankings: Sequence[Ranking]) -> dict[str, str]:
    """File name → content: ranks and pairs as CSV, and the ranks as LaTeX; no stream's table has such a name."""
    if not rankings:
        return {}
    ranks = [[r.metric, r.validation, stream, strategy, own[j]] for r in rankings
             for stream, own in [*zip(r.streams, r.ranks, strict=True), ("mean", r.means)]
             for j, strategy in enumerate(r.strategies)]  # fmt: skip
    pairs = [[r.metric, r.validation, len(r.streams), r.chi_squared, r.p_value, r.smallest, r.critical_difference,
              p.first, p.second, p.difference, p.p_value, p.p_holm] for r in rankings for p in r.pairs]  # fmt: skip
    head = ["metric", "validation", "streams", "chi_squared", "p_friedman", "smallest_p_friedman",
            "critical_difference", "first", "second", "rank_difference", "p_wilcoxon", "p_wilcoxon_holm"]  # fmt: skip
    return {"stream_ranks.csv": csv_text(["metric", "validation", "stream", "strategy", "rank"], ranks),
            "stream_ranks_pairs.csv": csv_text(head, pairs),
            "stream_ranks.tex": "\n".join(map(_latex, rankings))}  # fmt: skip


def _latex(ranking: Ranking) -> str:
    rows = [[stream, *(f"{r:g}" for r in own)] for stream, own in zip(ranking.streams, ranking.ranks, strict=True)]
    rows.append(["mean", *(f"{m:.2f}" for m in ranking.means)])
    return latex_text(f"{title(ranking)}. {ranking.said()}", ["Stream", *ranking.strategies], rows)
