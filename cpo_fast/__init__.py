"""cpo_fast: teach a language model to reason in one chain by learning from its own search tree.

Importing this package loads nothing but the standard library. Every heavy library is imported by the module that
needs it, when it is needed.
"""

__version__ = "0.1.0"
