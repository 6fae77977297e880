"""Training objectives: losses over any network ``net(x, t, s, labels)``."""
