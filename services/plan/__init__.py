"""Whether a job fits described hardware, and how it is laid out there: pure, no cluster and no GPU needed."""
