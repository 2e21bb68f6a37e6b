"""How a model's attention becomes GroupQueryAttention nodes: the plan, the nodes, rotation, masks and int8 caches."""
