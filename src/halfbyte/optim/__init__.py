"""How the adapters move: the optimizer and the learning rate."""
