"""Reasons that many questions fail for: the first few in full, the others counted."""

from collections import Counter

SAID = 3  # times that a reason is said in full


class Repeats:
    """Equal reasons of one run. `says` is asked for every failure, `rest` at the end."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def says(self, reason: str) -> bool:
        """Count a failure, and tell whether it is to be said in full."""
        self._counts[reason] += 1
        return self._counts[reason] <= SAID

    def rest(self) -> list[str]:
        """A sentence for every reason of which some were not said. Counts begin anew."""
        sentences = []
        for reason, count in self._counts.items():
            if count > SAID:
                what = "question" if count == SAID + 1 else "questions"
                sentences.append(f"{count - SAID} more {what} failed for the same reason: {reason}")
        self._counts.clear()
        return sentences
