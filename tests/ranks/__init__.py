"""What each process of a test does: scripts that torchrun starts, as users do."""
