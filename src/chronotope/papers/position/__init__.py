"""Pages of mechanisms that tell attention where tokens are."""
