"""The packs that come with the project, and how to make them again."""
