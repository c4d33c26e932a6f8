"""The catalog: every system of the literature that Foveate covers or will, where it lives, and whether it works."""

from foveate.papers.catalog import Paper, paper, papers

__all__ = ["Paper", "paper", "papers"]
