"""LoRA adapters on dense and 4-bit linear layers, in peft's classes and peft's files."""
