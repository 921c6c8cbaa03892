"""Readers of interaction data, and the batches made from it."""
