"""The ragged cache: what a model's layers hold, step by step and round by round. Knows no engine."""
