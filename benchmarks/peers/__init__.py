"""The engines ModularBase is measured against, and how their output is read."""
