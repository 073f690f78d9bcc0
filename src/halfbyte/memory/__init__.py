"""Who uses which bytes, and what to do when there are too few."""
