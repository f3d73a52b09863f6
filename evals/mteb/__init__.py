"""Files as models of mteb, and the shipped texts as its tasks."""
