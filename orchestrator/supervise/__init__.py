"""What keeps a head and a controller up until a sweep is over."""
