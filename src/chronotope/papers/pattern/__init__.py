"""Static patterns: who looks at whom is known before the data."""
