"""The page that recommends without a server: static files that `m6rec export --to web` copies next to a model."""
