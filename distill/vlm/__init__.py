"""Training and scoring of generative models on scenes: batches, the loop, accuracy by type of question."""
