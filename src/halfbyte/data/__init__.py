"""From a file or a hub name to seeded, resumable batches."""
