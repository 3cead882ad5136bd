"""Jobs that train and measure: `compare`."""
