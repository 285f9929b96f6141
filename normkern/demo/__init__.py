"""The demo: train a small ResNet on handwritten digits with every tool of normkern."""
