"""What a store must be able to do, tried before any GPU is paid for."""
