"""From a planned sweep to one that runs: checks, uploads, records, a controller."""
