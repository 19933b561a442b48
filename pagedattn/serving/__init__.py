"""Real inference on a serving engine, measured: the load, the clients, what they waited for."""
