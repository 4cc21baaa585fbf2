"""From a file to the runs it plans, and what a store keeps of them."""
