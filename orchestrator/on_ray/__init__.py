"""Where the rest meets Ray: agents, the controller as an actor, local clusters."""
