"""A logger of your own: it writes the rewards as a table for a spreadsheet.

basis-jax train --config quickstart --run-dir runs/own_logger \
    --train.loggers tensorboard examples/own_logger.py:Table
"""


class Table:
    def __init__(self, run):
        """``run`` has folder, config, next_step and remote_id."""
        self.path = run.folder / "rewards.csv"
        old = self.path.read_text().splitlines() if run.next_step else []
        kept = [line for line in old[1:] if int(line.split(",")[0]) < run.next_step]
        self.path.write_text("\n".join(["step,reward", *kept]) + "\n")

    def log(self, step, metrics):
        if "reward/mean" in metrics:
            with self.path.open("a") as file:
                file.write(f"{step},{metrics['reward/mean']}\n")

    def close(self):
        """Nothing is left open."""
