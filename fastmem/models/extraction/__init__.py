"""What can be taken out of a model: greedy decoding, samples and windows of long documents."""
