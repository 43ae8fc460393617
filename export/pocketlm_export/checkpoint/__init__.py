"""A Hugging Face checkpoint as plain data: configuration, tensors, tokenizer files. No pickle, no remote code."""
