"""Writes the files that are generated: templates, help pages, names, the blueprint."""
