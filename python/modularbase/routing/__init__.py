"""Which packs a request should have, and which come next."""
