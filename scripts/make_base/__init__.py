"""Makes the base model that the package embeds: text, tokenizer, training, model card."""
