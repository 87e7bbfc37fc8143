"""Device code and, beside it, its launchers, config spaces and registration with the tuner."""
