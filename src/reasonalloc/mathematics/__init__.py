"""Grading mathematics: which words are the answer, one notation for all, equality, a process that may be ended."""
