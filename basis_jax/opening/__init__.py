"""From a config to the first rollout: checks, plans, and what stays fixed during a run."""
