"""What a verifier says of a completion, and what every verifier offers."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Verdict:
    """``reward`` 1 or 0; ``valid`` False where nothing could be told; ``reason`` for a reader."""

    reward: float
    valid: bool
    reason: str


RIGHT = Verdict(1.0, True, "equal")
WRONG = Verdict(0.0, True, "differs")


class Verifier:
    """A context manager; its processes, where it has any, end with the block."""

    def grade(self, completions: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        """A verdict for each completion; ``answers`` are the right ones. From any thread."""
        raise NotImplementedError

    def close(self) -> None:
        """End the processes."""

    def __enter__(self) -> "Verifier":
        return self

    def __exit__(self, *_) -> None:
        self.close()
