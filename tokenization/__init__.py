"""Text: tokenizer, processor, templates."""
