"""Converted models in the layouts of others."""
