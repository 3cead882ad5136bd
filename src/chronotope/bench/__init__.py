"""Times as ratios, checked and measured side by side in one run: `chronotope bench`."""
