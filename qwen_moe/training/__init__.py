"""Training: optimizer, schedule, the step and the loop around it."""
