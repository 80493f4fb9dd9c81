"""The rounds of an `iterate.json` as cells: one column a round on the terminal, one row a round on the page."""

from typing import Any


def round_cells(one: dict[str, Any]) -> dict[str, str]:
    """A round by the headings of the table. What it has not is "-"."""
    stages = one["stages"]
    search, evaluation = stages.get("collect", {}), stages.get("eval", {})
    steps = [str(stages[name]["num_steps"]) for name in ("sft", "train") if "num_steps" in stages.get(name, {})]
    low, high = evaluation.get("interval") or (None, None)
    seconds = sum(record.get("seconds", 0.0) for record in stages.values())
    # what an interrupted start of a stage took stands nowhere
    is_longer = any(record["num_starts"] > 1 for record in stages.values())
    return {
        "questions searched": _shown(search.get("num_questions"), "d"),
        "vote accuracy": _shown(search.get("vote_accuracy"), ".1%"),
        "pairs": _shown(stages.get("pairs", {}).get("num_pairs"), ",d"),
        "steps": " + ".join(steps) or "-",
        "dev accuracy": _shown(evaluation.get("accuracy"), ".1%"),
        "95 % interval": "-" if low is None else f"{low:.1%} - {high:.1%}",
        "dev agreement": _shown(stages.get("votes", {}).get("agreement"), ".1%"),
        "thoughts per state": _shown(search.get("thoughts_per_state"), ".2f"),
        "paths per question": _shown(search.get("paths_per_question"), ".2f"),
        "tokens searched": _shown(search.get("num_generated_tokens"), ",d"),
        "seconds": f"{'over ' if is_longer else ''}{seconds:.0f}",
    }


def _shown(value: Any, form: str) -> str:
    return "-" if value is None else format(value, form)
