"""Causal language models of any library: how they are loaded, and their hidden states and heads."""
