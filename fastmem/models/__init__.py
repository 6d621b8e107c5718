"""GPT-2, its losses and gradients, and the bits of a sequence under it."""
