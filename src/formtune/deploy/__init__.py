"""What is in production: the pointer to it, its server, and a check of what is served."""
