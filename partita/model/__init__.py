"""The layers, and the reference on one device that judges them."""
