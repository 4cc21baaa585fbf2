"""From a planned sweep to one that runs: what is checked before, and a controller."""
