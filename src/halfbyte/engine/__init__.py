"""The fast path: decoder layers run fused, with what they save chosen by a policy."""
