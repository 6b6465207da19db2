"""`shoal serve`: the engine behind HTTP, for OpenAI and Anthropic clients and for the browser."""
