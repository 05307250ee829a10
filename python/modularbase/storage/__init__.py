"""The user's data folder and how files get into it: shared by bases and packs."""
