"""Help pages: the prose beside this file, one section per node and language, joined with lists of inputs and outputs.

`python -m authoring.help` writes web/docs/ anew.
"""
