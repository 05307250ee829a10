"""Training of packs in PyTorch against a frozen base, and their way into a running engine."""
