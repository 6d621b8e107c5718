"""Likelihoods without logits inside of other libraries, one optional module for each library."""
