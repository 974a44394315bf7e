"""A training run: its parts, training set, Trainer, checkpoints, fine-tuning, pretraining, facts for the card."""
