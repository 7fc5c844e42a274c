"""The source of a data set, and the benchmark sets that are known by name."""

from collections.abc import Collection
from dataclasses import dataclass

from basis_jax.verify.criteria import EXACT, MINERVA, Tolerance


@dataclass(frozen=True)
class Source:
    """A data set and how its rows are read. If a column name is empty, the column is recognised
    (``sources.COLUMN_LAYOUTS``)."""

    path: str
    split: str = "test"
    problem_field: str = ""
    answer_field: str = ""
    wrapper: str = ""
    wanted: str = "any"  # of several accepted answers
    tolerance: Tolerance = EXACT  # of numbers
    otherwise: tuple[tuple[str, str], ...] = ()  # column names to try if those are missing
    columns: Collection[str] | None = None  # columns kept with a problem; None: all
    required: Collection[str] = ()  # columns without which rewards cannot be given
    needs_answers: bool = True  # rows without an answer are left out
    option: str = "--eval.sets"  # the option to change if the set cannot be read


BENCHMARKS = {
    "MATH-500": Source("HuggingFaceH4/MATH-500", "test", "problem", "answer"),  # 500
    "AIME24": Source("HuggingFaceH4/aime_2024", "train", "problem", "answer"),  # 30
    "AIME25": Source("math-ai/aime25", "test", "problem", "answer"),  # 30
    "AMC23": Source("math-ai/amc23", "test", "question", "answer"),  # 40
    "HMMT25": Source("MathArena/hmmt_feb_2025", "train", "problem", "answer"),  # 30
    "Minerva": Source(
        "math-ai/minervamath", "test", "question", "answer", tolerance=MINERVA
    ),  # 272
    "OlympiadBench": Source(
        "math-ai/olympiadbench", "test", "question", "final_answer", wanted="all"
    ),  # 674, text only and in English; the answer is a list, ``error`` its tolerance
    "GSM8K": Source("openai/gsm8k:main", "test", "question", "answer"),  # 1,319, after ####
}
"""Hub ids, splits, columns and sizes are from dataset cards and public evaluation code (November
2026). tests/data has a fixture of our own for each layout."""
