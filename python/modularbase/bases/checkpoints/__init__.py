"""Checkpoints of transformers as GGUF files: folder, tensors, numbers, vocabulary, and writing."""
