"""Post-training: supervised fine-tuning, preferences, reinforcement learning, and what they learn from."""
