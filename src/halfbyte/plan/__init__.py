"""What a run will need, before it takes it."""
