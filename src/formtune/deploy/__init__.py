"""Deployments, servers, and a check of what is served."""
