"""Answers of a trained model: a user of the log, a request, a file of requests, here or by Ray."""
