"""How batch norms are fused with what follows them in a model's own code.

A block is a module whose forward calls batch norms. ``tracing`` records the steps of its forward,
``matching`` finds batch norm, addition and activation among them, ``search`` does that for all
blocks of a model, and ``rewriting`` gives each a class whose forward has one step for the three,
which ``running`` takes. ``checking`` compares a model with what became of it.
"""
