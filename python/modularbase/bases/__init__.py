"""Bases: where they come from, their tokenizers and their chat templates."""
