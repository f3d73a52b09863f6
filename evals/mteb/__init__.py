"""Files as models of mteb, and the evaluation texts as its tasks."""
