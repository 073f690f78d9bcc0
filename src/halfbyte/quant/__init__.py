"""The 4-bit weight and the linear layer on it."""
