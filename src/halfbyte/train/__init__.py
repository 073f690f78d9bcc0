"""The supervised fine-tuning loop: what a step is, what is kept, what is shown."""
