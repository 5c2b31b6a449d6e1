"""What a run reads: prompts, models, golden answers, verifiers, pruned students, and the preflight over them."""
