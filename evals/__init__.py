"""Two sets of vectors become a verdict."""
