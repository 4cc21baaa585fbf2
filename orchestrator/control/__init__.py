"""Who trains what, where and when: pure decisions, and the controller that carries them out."""
