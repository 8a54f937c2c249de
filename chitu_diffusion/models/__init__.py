"""The networks, one plain file each; attention and cache are arguments; no request, no setting."""
