"""Many ModelInstances at once: a real API server, the real runner protocol, engines that take no time."""
