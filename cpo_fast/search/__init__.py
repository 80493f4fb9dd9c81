"""Tree of thoughts: expand states, judge them, keep the best, vote on the answer, and write every tree down."""
