"""Models: loaded, quantized, and looked into."""
