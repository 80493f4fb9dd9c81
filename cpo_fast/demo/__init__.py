"""What the demonstration brings along: a 135M model converted from a PyPI package, and easy word problems."""

from pathlib import Path

from cpo_fast.demo.model import convert_demo_model, find_gguf

QUESTIONS = Path(__file__).with_name("questions.jsonl")
"""Twelve word problems of one or two steps, one JSON object a line: id, question, answer."""

__all__ = ["QUESTIONS", "convert_demo_model", "find_gguf"]
