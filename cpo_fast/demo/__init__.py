"""What the demonstrations bring along: a tiny reasoner with its task and questions, and word problems for a 135M model."""

from cpo_fast.demo.model import convert_demo_model, find_gguf
from cpo_fast.demo.recipes import QUESTIONS, REASONER, Recipe, reasoner_recipe, smollm2_recipe

__all__ = [
    "QUESTIONS",
    "REASONER",
    "Recipe",
    "convert_demo_model",
    "find_gguf",
    "reasoner_recipe",
    "smollm2_recipe",
]
