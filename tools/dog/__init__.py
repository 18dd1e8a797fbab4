"""dog, the administration tool."""
