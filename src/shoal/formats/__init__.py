"""What lies on disk: Hugging Face folders and training checkpoints."""
