"""Causal language models of any library: their hidden states, their heads, their windows."""
