"""The short distillation after a conversion."""
