"""Training of packs in PyTorch against a frozen base; needs the extra `modularbase[train]`."""
