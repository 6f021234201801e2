"""Effects: the ports to the Kubernetes API and to the runners, and who writes what through them."""
