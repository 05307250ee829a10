"""Packs trained in PyTorch against a frozen base, and shown to a running engine."""
