"""Attention of a search tree's frontier: every node that states share is read once, and the halves are merged."""

from cpo_kernels.tree_decode.reference import merge_partials, partial_attention

__all__ = ["merge_partials", "partial_attention"]
