"""Training: one loop for every network, schedules, and what trains. Healing stands on it."""
