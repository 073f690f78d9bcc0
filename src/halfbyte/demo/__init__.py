"""The embedded default: a small base model, a small task, and the run that shows both."""
