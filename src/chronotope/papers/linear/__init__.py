"""Linear attention and recurrences: a state of fixed size instead of a growing set of keys."""
