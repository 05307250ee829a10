"""A pack meets a new version of its base: what is lost, and what stage 2 recovers."""
