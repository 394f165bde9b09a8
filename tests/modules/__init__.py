"""The modules, conversion of models to them, and what they refuse."""
