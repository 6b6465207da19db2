"""What `shoal bench` runs: Shoal beside its peers, in one call."""
