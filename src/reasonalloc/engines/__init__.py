"""Engine adapters: thin layers that put the ragged cache into an inference engine."""
