"""Preference data: pairs from search trees, files of other code bases, and the order in which pairs are trained."""
