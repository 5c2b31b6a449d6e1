"""What runs on the cluster: one folder per Ray actor, its pure parts beside its shell."""
