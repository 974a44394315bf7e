"""Answers of a trained model for a user of the log, a request or a file of requests, in this process or by Ray."""
