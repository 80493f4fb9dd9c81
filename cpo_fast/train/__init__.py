"""Training: a LoRA adapter learns to prefer each step's winner, on forests of the step's pairs, under DeepSpeed."""
