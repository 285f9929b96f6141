"""Training runs that test the theory: the claims of four papers, and training in bfloat16."""
