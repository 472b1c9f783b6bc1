"""Pictures: sheets that compare, and charts."""
