"""What ranks train on: sources read lazily, tokenized once, cut into sequences; images."""
