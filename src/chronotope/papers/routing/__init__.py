"""Pages of mechanisms in which content decides who looks at whom."""
