"""`shoal recipe reasoning`: a model that learns to think, from nothing, on one machine."""
