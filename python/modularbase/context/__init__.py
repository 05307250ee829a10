"""Which tokens of a conversation are kept exactly, which in 4 bits, and which as a summary."""
