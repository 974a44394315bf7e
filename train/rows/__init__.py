"""From a log to training rows and batches: requests, labels, negatives, texts, packing, order."""
