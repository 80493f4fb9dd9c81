"""Drop-ins for other code bases. Nothing is imported here: each integration needs its own library."""
