"""Training rows and batches from a log: requests, labels, negatives, texts, packing, order."""
