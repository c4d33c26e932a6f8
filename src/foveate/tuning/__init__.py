"""Finds the cheapest method and setting that keep a model's quality."""
