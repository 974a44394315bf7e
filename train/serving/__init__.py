"""Answering over HTTP: the database of events and items, batching, the service and its command."""
