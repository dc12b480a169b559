"""Size of the change that an adapter makes to each weight: norms and a plot."""
