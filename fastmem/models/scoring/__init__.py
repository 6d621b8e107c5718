"""Scores of documents of any length under a causal language model, in memory or in a folder."""
