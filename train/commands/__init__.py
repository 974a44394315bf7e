"""What a command of `m6rec` does, one module each, for the commands that are more than a call."""
