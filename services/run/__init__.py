"""From a job to a finished run: launch, the loop, its fleet and placement, checkpoints."""
