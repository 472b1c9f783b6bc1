"""What the schemas of the nodes share: socket types and inputs."""
