"""Distillation of adapters: text, losses, the Trainer, the order of layers."""
