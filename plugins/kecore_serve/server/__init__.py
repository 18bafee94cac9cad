"""The HTTP server of ``kecore serve``: an OpenAI-compatible one whose model is edited while it answers."""
