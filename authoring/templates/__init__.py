"""The example workflows: what is in each, how a graph is laid out (`graph`), and the pictures beside them."""
