"""The graph as a session: execution providers, caches, states, and the steps between them. Token ids in, logits out."""
