"""Where time and memory go: the ops against their limits and peers, and traces of training and sampling."""
