"""One page per published mechanism: `papers/<family>/<name>.py`. `papers()` lists them."""

from chronotope.papers.registry import Paper, paper, papers

__all__ = ["Paper", "paper", "papers"]
