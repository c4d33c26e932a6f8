"""Pieces that several methods share: scorers, probes, block summaries, and turning scores into lists."""
