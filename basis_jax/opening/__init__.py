"""Between reading a config and the first rollout: checks, then what stays fixed."""
