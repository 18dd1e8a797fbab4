"""Everything of the cluster that touches the operating system."""
