"""What each process of a test does: scripts, as torchrun starts those of users."""
