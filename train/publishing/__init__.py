"""Publishing a model: checks of its files, and the commit."""
