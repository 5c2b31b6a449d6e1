"""On-policy distillation on Ray with a closed loop on length."""
