"""Commands of `m6rec`, one module each, for the commands that are more than one call."""
