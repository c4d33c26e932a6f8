"""The catalog: every system of the literature that Foveate covers or will, where it lives, and whether it works."""

from foveate.papers.catalog import Paper, paper, papers
from foveate.papers.claim import MEASURES, TIMED, Check, Claim

__all__ = ["MEASURES", "TIMED", "Check", "Claim", "Paper", "paper", "papers"]
