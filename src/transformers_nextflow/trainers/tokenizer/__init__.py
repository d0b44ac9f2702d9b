"""Training of the vision tokenizer."""
