"""The update of a rank's units: AdamW and SGD over flat buffers, 16-bit masters, states elsewhere."""
