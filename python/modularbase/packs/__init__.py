"""Packs as files and packages: made, found, installed, checked; which of them go together."""
