"""Packs as files: what a pack says of itself, and which packs go together."""
