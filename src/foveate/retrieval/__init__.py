"""Retrieval: give the model the passages of a context that answer its question, in place of the whole."""

from foveate.retrieval.reader import RETRIEVERS, Retrieval

__all__ = ["RETRIEVERS", "Retrieval"]
