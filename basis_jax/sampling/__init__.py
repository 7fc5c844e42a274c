"""From prompts to graded rollouts."""
