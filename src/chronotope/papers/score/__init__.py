"""Pages of mechanisms that change how keys are scored, or how much heads count."""
