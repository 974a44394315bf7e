"""Publishing a model: what may be sent, and the commit."""
