"""Bits per token from hidden states and an output matrix, without the logits in memory."""
