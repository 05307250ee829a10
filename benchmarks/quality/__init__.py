"""What packs do to the perplexity of texts, beside LoRA adapters trained on the same blocks."""
