"""Pictures: SVG and HTML."""
