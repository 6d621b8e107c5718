"""Training loops: configuration, optimizer, steps, checkpoints."""
